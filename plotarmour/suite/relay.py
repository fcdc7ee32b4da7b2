"""What the processes of `launch` say, passed on: whole lines at once, a progress bar's state every few seconds."""

import sys
import time
from pathlib import Path

BAR_EVERY_S = 5.0  # a notebook keeps every state
ERROR = "error: "  # how plotarmour.cli begins a user's mistake


class Relay:
    """Follows the output of the first process, which speaks for all of them.

    Args:
        logs: folder that torchrun was given for them.

    Attributes:
        errors: the user's mistakes that were met; they are not passed on.
    """

    def __init__(self, logs: Path):
        self.logs, self.errors = logs, []
        self._outputs = {"stdout": b"", "stderr": b""}  # what has been read of a line that is not whole yet
        self._read = dict.fromkeys(self._outputs, 0)
        self._shown, self._bar_at = "", 0.0  # the bar as it stands in the output, and since when

    def pass_on(self, to_the_end: bool = False) -> None:
        """Print what is new: whole lines, and the bar if it is time to. At the end, also what has no line break."""
        for name in self._outputs:
            *lines, self._outputs[name] = (self._outputs[name] + self._new(name)).split(b"\n")
            if to_the_end and self._outputs[name]:
                lines, self._outputs[name] = [*lines, self._outputs[name]], b""
            for line in lines:
                self.say(last_state(_text(line)), sys.stdout if name == "stdout" else sys.stderr)
        bar = self._outputs["stderr"]
        self._outputs["stderr"] = bar[max(0, bar.rfind(b"\r")):]  # the states before are of no use any more
        bar = last_state(_text(bar))
        if bar and bar != self._shown and time.monotonic() - self._bar_at >= BAR_EVERY_S:
            self._show(bar)

    def say(self, line: str, file=None) -> None:
        """Print a line, in the place of the bar."""
        if line.startswith(ERROR):
            self.errors.append(line.removeprefix(ERROR))
        elif line:
            self._show("")
            print(line, file=file or sys.stderr, flush=True)

    def pass_on_others(self, processes: int) -> None:
        """Print what the other processes had to say, each line once; of interest where one has failed."""
        said = set()
        for rank in range(1, processes):
            for path in self._logs_of(rank, "stderr"):
                for line in path.read_bytes().split(b"\n"):
                    text = last_state(_text(line)).replace(f"{ERROR}process {rank}: ", ERROR, 1)
                    if text and text not in said:
                        said.add(text)
                        self.say(f"[process {rank}] {text}")

    def last_words(self) -> str:
        """The last line of torchrun's own log that is not decoration."""
        lines = (self.logs / "torchrun.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip(" =-")), "torchrun said nothing")

    def _new(self, name: str) -> bytes:
        for path in self._logs_of(0, name):
            with path.open("rb") as file:
                file.seek(self._read[name])
                new = file.read()
            self._read[name] += len(new)
            return new
        return b""

    def _logs_of(self, rank: int, name: str) -> list[Path]:
        return sorted(self.logs.glob(f"*/attempt_0/{rank}/{name}.log"))

    def _show(self, bar: str) -> None:
        """Replace the bar."""
        if bar or self._shown:
            blank = " " * (len(self._shown) - len(bar))
            print(f"\r{bar}{blank}" + "\r" * (not bar), end="", file=sys.stderr, flush=True)
        self._shown, self._bar_at = bar, time.monotonic() if bar else self._bar_at


def last_state(line: str) -> str:
    """What a terminal shows of a line that was written over again and again."""
    states = [state for state in line.split("\r") if state.strip()]
    return states[-1].rstrip() if states else ""


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")
