import pytest

TAKES_S = {"accumulate": 20.0, "evaluate_windows": 30.0, "save_checkpoint": 15.0}  # a step, an evaluation, a save


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the work of a run moves, by the seconds of TAKES_S."""
    from plotarmour.training import loop, progress
    from plotarmour.training import step as step_module

    clock = Clock()

    def taking(work, seconds):
        def slow(*args, **keywords):
            clock.now += seconds
            return work(*args, **keywords)
        return slow

    for module, name in ((step_module, "accumulate"), (loop, "evaluate_windows"), (loop, "save_checkpoint")):
        monkeypatch.setattr(module, name, taking(getattr(module, name), TAKES_S[name]))
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock
