import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_memory import data

from plotarmour.data.tales import POOLS
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.evaluation.contradictions import FILLERS, SWAPPED, auc, measure, swaps, tale
from plotarmour.machine import find_machine
from plotarmour.models.bdh import BDH, BDHConfig

BYTES = make_tokenizer("bytes")


@pytest.mark.parametrize("fact", FILLERS)
def test_the_drafts_of_a_tale_differ_in_one_fact_that_the_story_states_far_back(fact):
    """Guards: a fact that the last sentences name again; drafts that differ in more; a broken fact that is rarer.

    The holder was told by "<friend:friend>" instead of a name, and by the draft's first word, "Finally" or "Then"."""
    kept, broken, pools = [], [], POOLS
    for i in range(40):
        pair = tale(fact, 150, 7, i, BYTES)
        assert pair == tale(fact, 150, 7, i, BYTES)
        words = zip(pair.kept.split(), pair.broken.split(), strict=True)
        [(one, other)] = [(x.strip("."), y.strip(".")) for x, y in words if x != y]
        if fact == "holder":  # both are in the story; who got the object last has it
            given = re.findall(r"gave the dear \w+ (?:back )?to (\w+)", pair.story)
            options = re.search(r"named (\w+)", pair.story)[1], given[0]
            assert one == given[-1] and {one, other} == {*options}
        else:
            pool = pools["girl" if one in pools["girl"].options else "boy"] if fact == "hero" else pools[fact]
            options = pool.options
            assert {one, other} <= {*options} and not re.search(rf"\b{other}\b", pair.story)
        last = max(match.end() for match in re.finditer(rf"\b{'to ' * (fact == 'holder')}{one}\b", pair.story))
        assert len(pair.story) - last >= 150
        kept.append(options.index(one))
        broken.append(options.index(other))
    assert abs(np.mean(kept) - np.mean(broken)) < (0.1 if fact == "holder" else 2.5)  # ranks: 0 or 1; 0 to 29, skewed


def test_a_tale_to_train_on_names_several_facts_only_after_the_distance():
    """Guards: an event in between that names one of them."""
    pair = tale("animal", 400, 7, 0, BYTES, 2, ["place"])
    animal, place = re.search(r"near the old (\w+) with a little (\w+)", pair.story).groups()[::-1]
    text = f"{pair.story}{pair.kept}"
    for fact, near in ((animal, 0), (place, 3)):  # the opening and each round name the place twice
        gaps = np.diff([match.start() for match in re.finditer(rf"\b{fact}\b", text)])
        assert (gaps > 400).sum() == 2 and len(gaps) == 2 + near


def test_a_swap_puts_another_name_of_the_stories_into_the_last_sentence_that_names_one_again():
    """Guards: a sentence that names somebody for the first time; a swap to somebody who is in the story."""
    texts = ["Tom ran. He fell. Tom cried.", "Lily and Sam sat. Lily ate.", "Lily saw Tom. Sam saw Tom.", "No. One."]
    held_out = data(*(BYTES.encode(text) for text in texts), vocab_size=257, end=256)
    pairs = [pair for pair in swaps(held_out, BYTES) if pair.fact == "name"]
    assert [(pair.story, pair.kept) for pair in pairs] == [
        ("Tom ran. He fell.", "Tom cried."), ("Lily and Sam sat.", "Lily ate.")]  # in the third, all are there
    assert pairs[0].broken == "Lily cried." and pairs[1].broken == "Tom ate."
    assert pairs[0].distance == len(" ran. He fell.")
    assert all(word.isalpha() for words in SWAPPED.values() for word in words)


def test_auc_is_the_share_of_pairs_that_are_in_order():
    """Guards: ties that count as wins, sides turned around."""
    assert auc([1, 2], [3, 2])[0] == (1 + 1 + 1 + 0.5) / 4
    value, low, high = auc(np.arange(50), np.arange(50) + 10)
    assert 0.5 < low < value < high <= 1


def test_a_model_that_has_learned_the_story_finds_what_breaks_it():
    """Guards: scores of one draft on the side of the other; trigrams of the wrong tokens."""
    torch.manual_seed(0)
    model = BDH(BDHConfig(n_layer=1, n_embd=16, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=257)).eval()
    run = SimpleNamespace(name="bdh", model=model, machine=find_machine("cpu"), tokenizer=BYTES)
    pairs = [tale("hero", 0, 7, i, BYTES) for i in range(4)]
    train = data(*(BYTES.encode(f"{pair.story}{pair.kept}") for pair in pairs), vocab_size=257, end=256)
    table = measure([run], pairs, train).set_index(["run", "score"])["auc"]
    assert set(table.index.get_level_values("run")) == {"bdh", "trigram baseline"} and table.between(0, 1).all()
    assert table["trigram baseline", "nats"] > 0.7  # of these drafts, it has counted the ones that keep the fact
