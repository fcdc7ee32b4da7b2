"""Tiled form of BDH, for training: the passes as one autograd function without any (B, H, T, N) tensor.

It computes head by head, over a few rows of the batch and in tiles of neurons. The forward pass stores, per pass, v
(B, T, D), the decoder's sum m (B, T, D), and the blocks of the scores S (B, H, T, T) on and below the diagonal; the
backward pass computes x and y again. For one head:

    x = relu(v E)          q = rope(x)        S = tril(q qᵀ, -1)      a = S v
    y = relu(LN(a) E_y)    g = x ∘ y ∘ keep   m += g D_

    dD_ += gᵀ dm           dg = keep ∘ (dm D_ᵀ)
    dy = dg ∘ x ∘ [y > 0]  dE_y += LN(a)ᵀ dy  da = LN'(dy E_yᵀ)
    dv += Sᵀ da            dS = tril(da vᵀ, -1)      with decay, S and dS are multiplied by its powers
    dq = (dS + dSᵀ) q      q is both query and key, so this is one product of width N instead of two
    dx = (rope⁻¹(dq) + dg ∘ y) ∘ [x > 0]      dE += vᵀ dx      dv += dx Eᵀ

In float16 the scores would overflow. Therefore q is multiplied by s = 2^-k there, so S and a are multiplied by s², and
the epsilon of LN by s⁴: (s² a) / sqrt(var(s² a) + s⁴ eps) is exactly LN(a). Sums over tiles and heads are in float32 or
float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from plotarmour.models.dropout import CounterDropout
from plotarmour.models.parts import EPS, Weights, add_residual, normalize, normalize_backward
from plotarmour.models.rotary import rotate_into

CPU_TILE = 2**19  # elements of a (rows · T, neurons) tile on a CPU: 2 MiB in float32, which fits its cache
GPU_BUFFER = 2**25  # elements of a (rows, T, N) buffer on a GPU: 64 MiB in float16, enough to use it fully


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles."""

    rows: int  # of the batch
    neurons: int  # of one head; even, because rotation works on pairs; need not divide N
    positions: int  # height of a block of scores; blocks above the diagonal are not computed

    @staticmethod
    def for_shape(B: int, T: int, N: int, device: torch.device) -> "Tiling":
        """Choose tiles that fit the cache of a CPU (measured), or few large products on a GPU (not measured)."""
        buffer, tile, height = (2 * CPU_TILE, CPU_TILE, 128) if device.type == "cpu" else (GPU_BUFFER, GPU_BUFFER, 256)
        rows = min(B, max(1, buffer // (T * N)))
        return Tiling(rows, min(N, max(64, tile // (rows * T) // 64 * 64)), height)


@dataclass(frozen=True)
class Setting:
    """Settings that all passes share."""

    factors: Tensor  # of rotation, complex (T, N / 2)
    dropout: CounterDropout | None
    tiling: Tiling
    first_position: int = 0  # of the first token, for dropout
    stories: Tensor | None = None  # int64 (B, T), number of each token's story, 0 that of the state; None: no mask
    decays: Tensor | None = None  # see `powers`

    def weigh(self, scores: Tensor, rows: slice, h: int, i: int, j: int) -> None:
        """Let scores (rows, j - i, j) of tokens i, ..., j - 1 decay, and set those with other stories to 0."""
        if self.decays is not None:
            scores.mul_(self._by_distance[h, i:j, :j])
        if self.stories is not None:
            stories = self.stories[rows]
            scores.masked_fill_(stories[:, i:j, None] != stories[:, None, :j], 0.0)

    @cached_property
    def _by_distance(self) -> Tensor:
        """Decays of all pairs of tokens, (H, T, T)."""
        place = torch.arange(len(self.factors), device=self.decays.device)
        return self.decays[:, (place[:, None] - place).abs()]

    def dropout_rows(self, level: int, rows: slice, h: int) -> Tensor | None:
        """Return the hashes of `CounterDropout.rows` for a pass, rows of the batch and a head, (rows · T,)."""
        if self.dropout is None:
            return None
        positions = range(self.first_position, self.first_position + len(self.factors))
        return self.dropout.rows(level, range(rows.start, rows.stop), range(h, h + 1), positions).flatten()


class Scratch:
    """Reusable buffers by name and dtype. On a CPU, page faults of new memory cost as much time as the arithmetic."""

    def __init__(self, device: torch.device):
        self.device, self.buffers = device, {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a buffer of this shape; its values are undefined."""
        n, buffer = math.prod(shape), self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < n:
            buffer = self.buffers[name, dtype] = torch.empty(n, dtype=dtype, device=self.device)
        return buffer[:n].view(shape)


class Passes(torch.autograd.Function):
    """All passes: from embeddings v (B, T, D), float32 or float64, to v after the last pass, in the same dtype.

    The other arguments of `Passes.apply` are the parameters, `mix` and `signs` of `Weights`, the number of passes, the
    dtype of products, a `Setting`.
    """

    @staticmethod
    def forward(ctx, v, encoder, encoder_v, decoder, mix, signs, n_layer, dtype, setting):
        with torch.autocast(v.device.type, enabled=False):
            weights = Weights(encoder.to(dtype), encoder_v.to(dtype), decoder.to(dtype), signs=signs)
            scratch, saved, before = Scratch(v.device), [], []
            for level in range(n_layer):
                scores: list[Tensor] = []
                m = pass_forward(level, v, weights.of_pass(level), setting, scratch, keep=scores)
                saved += [v, m, *scores]
                before.append(v)
                v = normalize(add_residual(before, normalize(m)[0], mix, level))[0]
        ctx.save_for_backward(encoder, encoder_v, decoder, mix, signs, v, *saved)
        ctx.n_layer, ctx.dtype, ctx.setting = n_layer, dtype, setting
        return v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dv):
        encoder, encoder_v, decoder, mix, signs, v_next, *saved = ctx.saved_tensors
        each, d_before = len(saved) // ctx.n_layer, [0.0] * ctx.n_layer  # gradients of v from residuals of later passes
        d_mix, d_signs = (None if each is None else torch.zeros_like(each) for each in (mix, signs))
        with torch.autocast(dv.device.type, enabled=False):
            weights = Weights(encoder.to(ctx.dtype), encoder_v.to(ctx.dtype), decoder.to(ctx.dtype), signs=signs)
            gradient = Weights(torch.zeros_like(encoder), torch.zeros_like(encoder_v), torch.zeros_like(decoder),
                               signs=d_signs)
            scratch = Scratch(dv.device)
            for level in reversed(range(ctx.n_layer)):
                v, m, *scores = saved[level * each:(level + 1) * each]
                before, (normal, rstd) = saved[:(level + 1) * each:each], normalize(m)
                d_sum = normalize_backward(dv, v_next, normalize(add_residual(before, normal, mix, level))[1])
                dv = d_normal = d_sum
                if mix is not None:
                    for i, part in enumerate(before):
                        d_mix[level, i] = (d_sum * part).sum((0, 1))
                        d_before[i] = d_before[i] + d_sum * mix[level, i]
                    d_mix[level, -1] = (d_sum * normal).sum((0, 1))
                    dv, d_normal = d_before[level], d_sum * mix[level, -1]
                dm = normalize_backward(d_normal, normal, rstd)
                v_next = v
                pass_backward(level, v, scores, dm, dv, weights.of_pass(level), gradient.of_pass(level), ctx.setting,
                              scratch)
        return dv, gradient.encoder, gradient.encoder_v, gradient.decoder, d_mix, d_signs, None, None, None


def pass_forward(level: int, v: Tensor, weights: Weights, setting: Setting, scratch: Scratch,
                 keep: list[Tensor] | None = None, synapses: Tensor | None = None) -> Tensor:
    """Compute the decoder's sum m of one pass.

    Args:
        level: index of the pass, from 0.
        v: (B, T, D), float32 or float64.
        weights: in the dtype of products.
        setting, scratch: as for the other passes.
        keep: list to append the blocks of scores to, (B, H, height, width); None discards them.
        synapses: state of this pass before the first token, (B, H, N, D), updated in place; None: there is none.

    Returns:
        m, (B, T, D), in the dtype of v.
    """
    (B, T, D), (H, _, N) = v.shape, weights.shape
    dtype, tiling, scale = weights.encoder.dtype, setting.tiling, weights.score_scale
    m, v_product = torch.zeros_like(v), v.to(dtype)
    blocks = [(i.start, i.stop) for i in _slices(T, tiling.positions)]
    all_scores = None if keep is None else [v.new_empty(B, H, j - i, j) for i, j in blocks]
    for h in range(H):
        for rows in _slices(B, tiling.rows):
            G = rows.stop - rows.start
            flat_v, flat_m = v_product[rows].view(G * T, D), m[rows].view(G * T, D)
            x = _neurons(flat_v, weights.encoder[h], scratch.get("x", (G * T, N), dtype))
            if all_scores is None:
                scores = [scratch.get(f"scores {i}", (G, j - i, j), v.dtype) for i, j in blocks]
            else:
                scores = [block[rows, h] for block in all_scores]
            a = scratch.get("a", (G, T, D), v.dtype).zero_()
            for n in _slices(N, tiling.neurons):
                q = _rotated(x, n, G, setting.factors, scale, scratch)
                _add_scores(scores, _signed(q, weights, h, n), q, blocks, first=n.start == 0)
                if synapses is not None:
                    S, unscaled = synapses[rows, h, n], q.to(v.dtype) / scale if scale != 1 else q.to(v.dtype)
                    reads, writes = _signed(unscaled, weights, h, n), unscaled
                    if setting.stories is not None:
                        story = setting.stories[rows, :, None]
                        reads, writes = reads * (story == 0), writes * (story == story[:, -1:])
                    if setting.decays is not None:
                        decays = setting.decays[h][:, None]
                        reads, writes = reads * decays[1:], writes * decays[:-1].flip(0)
                    a.baddbmm_(reads, S, alpha=scale**2)
                    if setting.stories is not None:
                        S.mul_(story[:, -1:] == 0)
                    if setting.decays is not None:
                        S.mul_(decays[-1])
                    S.baddbmm_(writes.mT, v[rows])
            for (i, j), block in zip(blocks, scores, strict=True):
                block[..., i:].tril_(-1)
                setting.weigh(block, rows, h, i, j)
            _attend(a, scores, v[rows], blocks)
            normal = normalize(a, EPS * scale**4)[0].to(dtype).view(G * T, D)
            hashes = setting.dropout_rows(level, rows, h)
            for n in _slices(N, tiling.neurons):
                shape = G * T, n.stop - n.start
                g = _neurons(normal, weights.encoder_v[h, :, n], scratch.get("y", shape, dtype)).mul_(x[:, n])
                if hashes is not None:
                    g.mul_(_mask(setting.dropout, hashes, n, shape, dtype, scratch))
                _add_product(flat_m, g, weights.decoder[h * N + n.start:h * N + n.stop])
    if keep is not None:
        keep += all_scores
    return m.mul_(setting.dropout.scale) if setting.dropout else m


def pass_backward(level: int, v: Tensor, kept_scores: list[Tensor], dm: Tensor, dv: Tensor, weights: Weights,
                  gradient: Weights, setting: Setting, scratch: Scratch) -> None:
    """Add the gradients with respect to v and to the weights to `dv` and `gradient`, in place.

    Args:
        level, v, weights, setting, scratch: see `pass_forward`.
        kept_scores: blocks of scores that `pass_forward` stored.
        dm: gradient with respect to m, (B, T, D).
        dv: (B, T, D).
        gradient: in the dtype of the parameters.
    """
    (B, T, D), (H, _, N) = v.shape, weights.shape
    dtype, tiling, scale = weights.encoder.dtype, setting.tiling, weights.score_scale
    if setting.dropout:
        dm = dm * setting.dropout.scale
    v_product, dm_product = v.to(dtype), dm.to(dtype)
    blocks = [(i.start, i.stop) for i in _slices(T, tiling.positions)]
    for h in range(H):
        decoder, d_decoder = (w.decoder[h * N:(h + 1) * N] for w in (weights, gradient))
        for rows in _slices(B, tiling.rows):
            G = rows.stop - rows.start
            flat_v, flat_dm = v_product[rows].view(G * T, D), dm_product[rows].view(G * T, D)
            flat_dv, scores = dv[rows].view(G * T, D), [block[rows, h] for block in kept_scores]
            x = _neurons(flat_v, weights.encoder[h], scratch.get("x", (G * T, N), dtype))
            through_gate = scratch.get("through gate", (G * T, N), dtype)  # dg ∘ y
            a = _attend(scratch.get("a", (G, T, D), v.dtype).zero_(), scores, v[rows], blocks)
            normal, rstd = normalize(a, EPS * scale**4)
            flat_normal = normal.to(dtype).view(G * T, D)
            d_normal = scratch.get("d normal", (G * T, D), v.dtype).zero_()
            hashes = setting.dropout_rows(level, rows, h)
            for n in _slices(N, tiling.neurons):
                shape = G * T, n.stop - n.start
                encoder_v = weights.encoder_v[h, :, n]
                y = _neurons(flat_normal, encoder_v, scratch.get("y", shape, dtype))
                dg = torch.mm(flat_dm, decoder[n].T, out=scratch.get("dg", shape, dtype))
                g = torch.mul(x[:, n], y, out=scratch.get("g", shape, dtype))
                if hashes is not None:
                    mask = _mask(setting.dropout, hashes, n, shape, dtype, scratch)
                    g.mul_(mask)
                    dg.mul_(mask)
                _add_product(d_decoder[n], g.T, flat_dm)
                torch.mul(dg, y, out=through_gate[:, n])
                dy = _where_positive(dg.mul_(x[:, n]), y)
                _add_product(gradient.encoder_v[h, :, n], flat_normal.T, dy)
                _add_product(d_normal, dy, encoder_v.T)
            da = normalize_backward(d_normal.view(G, T, D), normal, rstd)
            for (i, j), block in zip(blocks, scores, strict=True):
                dv[rows, :j].baddbmm_(block.mT, da[:, i:j])
            d_scores = _symmetric_score_gradient(da, v[rows], blocks, scratch)
            setting.weigh(d_scores, rows, h, 0, T)
            d_scores = d_scores.mul_(scale).to(dtype)
            for n in _slices(N, tiling.neurons):
                q = _rotated(x, n, G, setting.factors, scale, scratch)
                dq = torch.bmm(d_scores, q, out=scratch.get("dq", q.shape, dtype))
                if weights.signs is not None:  # half, because dS counts twice
                    gradient.signs[h, n] += (q.to(v.dtype) * dq).sum((0, 1)).div_(2 * scale)
                    dq = _signed(dq, weights, h, n)
                back = scratch.get("conjugate", (T, q.shape[-1] // 2), setting.factors.dtype)
                torch.conj_physical(setting.factors[:, n.start // 2:n.stop // 2], out=back)
                dx = rotate_into(scratch.get("turned", q.shape, v.dtype), dq, back).flatten(0, 1)
                dx = _where_positive(dx.add_(through_gate[:, n]).to(dtype), x[:, n])
                _add_product(gradient.encoder[h, :, n], flat_v.T, dx)
                _add_product(flat_dv, dx, weights.encoder[h, :, n].T)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def _neurons(v: Tensor, encoder: Tensor, out: Tensor) -> Tensor:
    return torch.mm(v, encoder, out=out).relu_()


def _rotated(x: Tensor, n: slice, G: int, factors: Tensor, scale: float, scratch: Scratch) -> Tensor:
    """Return q (G, T, neurons) of tile `n` of x (G·T, N), in the dtype of x."""
    tile = x[:, n].unflatten(0, (G, -1))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q = rotate_into(scratch.get("q", tile.shape, wide), tile, factors[:, n.start // 2:n.stop // 2])
    return (q if scale == 1.0 else q.mul_(scale)).to(x.dtype)


def _signed(q: Tensor, weights: Weights, h: int, n: slice) -> Tensor:
    return q if weights.signs is None else q * weights.signs[h, n].to(q.dtype)


def _add_scores(scores: list[Tensor], q: Tensor, k: Tensor, blocks: list[tuple[int, int]], first: bool) -> None:
    for (i, j), block in zip(blocks, scores, strict=True):
        if q.dtype == block.dtype:
            block.baddbmm_(q[:, i:j], k[:, :j].mT, beta=0 if first else 1)
        else:
            product = q[:, i:j] @ k[:, :j].mT
            block.copy_(product) if first else block.add_(product)


def _attend(a: Tensor, scores: list[Tensor], v: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """Add S v to a, and return a."""
    for (i, j), block in zip(blocks, scores, strict=True):
        a[:, i:j].baddbmm_(block, v[:, :j])
    return a


def _symmetric_score_gradient(da: Tensor, v: Tensor, blocks: list[tuple[int, int]], scratch: Scratch) -> Tensor:
    """Return dS + dSᵀ, (G, T, T), with dS = tril(da vᵀ, -1)."""
    G, T, _ = v.shape
    d = scratch.get("d scores", (G, T, T), v.dtype)
    for i, j in blocks:
        torch.bmm(da[:, i:j], v[:, :j].mT, out=d[:, i:j, :j])
        d[:, i:j, i:j].tril_(-1)
        d[:, i:j, i:j] += d[:, i:j, i:j].mT.clone()
        d[:, :i, i:j] = d[:, i:j, :i].mT
    return d


def _where_positive(d: Tensor, y: Tensor) -> Tensor:
    """Set d to 0 where y is 0: the gradient of relu, in place."""
    return torch.ops.aten.threshold_backward.grad_input(d, y, 0, grad_input=d)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to out; a product in half precision is added in the wider dtype of `out`."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def _mask(dropout: CounterDropout, hashes: Tensor, n: slice, shape: tuple[int, int], dtype: torch.dtype,
          scratch: Scratch) -> Tensor:
    """Return the mask of a tile, 0 and 1 in `dtype`: a conversion costs less than a product of mixed types."""
    return scratch.get("mask", shape, dtype).copy_(dropout.kept(hashes, n.start, n.stop))
