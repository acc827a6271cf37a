"""The state of a run before any of its steps, and the step evaluated there, within the memory that there is.

From one snapshot to the next the run goes forward once. Where it all fits, the evaluation of every step is kept on the way. Where it
does not, the steps are looked at part by part: a part is walked back from the state after it where its optimizer can be undone, so
that each step is evaluated once; elsewhere it is run forward, keeping its gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.trajectory import Clip, StepRecord
from lightning_influence.errors import InfluenceError, ReplayDrift
from lightning_influence.replay.drift import difference, difference_on_arrival
from lightning_influence.replay.evaluation import Evaluation, StepEvaluator, distance
from lightning_influence.replay.plan import Plan, PlannedStep, State
from lightning_influence.replay.segment import Segment, state_after
from lightning_influence.replay.walking_back import WALK, WalkBack, can_be_undone

_TOLERANCE = 1e-2  # of a segment's movement
_TOLERANCE_HALF = 0.2  # in half precision, where a step is often less than the rounding; reports tell the drift
_NORM_TOLERANCE = 1e-3  # of a gradient's norm
_WALK_TOLERANCE = 1e-3  # of the movement of a part that is walked back
_WALK_NORM_TOLERANCE = 1e-4  # of the same, where a run is walked back in full precision
_OF_STATES = (
    0.25  # part of the memory that is left, when all gradients of a segment are held; the rest is for evaluations
)


class WalkedAstray(ReplayDrift):
    """A run that was walked back does not arrive at the state that it left: it has to be run forward instead."""


class States:
    """The states of a run, by the module's own training steps.

    Args:
        trained: the parameters that the run moves, by name.
        memory: bytes that states, gradients and evaluations may take besides the evaluation at hand.
        walks: whether steps may be walked back.
        progress: show a bar where running steps takes longer than two seconds.

    Attributes:
        memory, walks: as given; they may be changed before a step is looked at.
        evaluated: how many evaluations of a step were made.
        drift: relative distance to each snapshot on arrival, by step.
    """

    def __init__(
        self,
        plan: Plan,
        evaluator: StepEvaluator,
        trained: Mapping[str, Tensor],
        *,
        memory: int = 2**32,
        walks: bool = True,
        progress: bool = True,
    ) -> None:
        self._plan, self._evaluator, self._progress = plan, evaluator, progress
        self.memory, self.walks, self.evaluated = memory, walks, 0
        self.drift: dict[int, float] = {}
        self._update = UPDATES[plan.optimizer]
        self._exact = all(p.dtype in (torch.float32, torch.float64) for p in trained.values())
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in trained.values())
        self._state_bytes = self._gradient_bytes * (1 + len(self._update.moments))
        self._evaluation_bytes: int | None = None
        self._ways: dict[int, bool] = {}  # of parts, by their beginnings: whether they are walked back
        self.clear()

    def clear(self) -> None:
        """Let go of everything that is held."""
        self._known: dict[int, State] = {}  # at the beginnings of parts
        self._release()

    def _release(self) -> None:
        """Let go of the part that is looked at."""
        self._segment: Segment | None = None
        self._walk: WalkBack | None = None
        self._walked: StepRecord | None = None  # of the step to which the walk has come
        self._now: tuple[int, Evaluation] | None = None

    def least(self) -> int:
        """Bytes without which no step can be looked at: the state where a part begins, the one at hand, the one that is made of
        it, and a gradient of each of two steps; one of each where every step has its snapshot.
        """
        if self._longest() == 1:
            return self._state_bytes + self._gradient_bytes
        return 3 * self._state_bytes + 2 * self._gradient_bytes

    def wanted(self) -> int:
        """Bytes with which no step is run forward more than once to find the states."""
        return self.least() + self._longest() * self._gradient_bytes

    def _longest(self) -> int:
        """Steps between two snapshots, at most."""
        bounds = [*self._plan.snapshots, len(self._plan)]
        return max((b - a for a, b in itertools.pairwise(bounds)), default=1)

    def state(self, index: int) -> State:
        """The state before a step, or after the last."""
        if index == len(self._plan):
            return self._run_part(index - 1).state(index)
        self._visit(index)
        if self._walk is not None:
            return self._walk.state
        assert self._segment is not None
        return self._segment.state(index)

    def record(self, index: int) -> StepRecord:
        """A step's record, without moments."""
        self._visit(index)
        if self._walked is not None:
            return self._walked
        assert self._segment is not None
        return self._segment.record(index)

    def evaluation(self, index: int) -> Evaluation:
        """The evaluation of a step; made again where it was not kept."""
        self._visit(index)
        evaluation = self._segment.evaluations.get(index) if self._segment is not None else None
        if evaluation is None and self._now is not None and self._now[0] == index:
            evaluation = self._now[1]
        if evaluation is None or (evaluation.graph is None and self._evaluator.exact):
            self._now = None
            evaluation = self._evaluate(index, self.state(index))
            self._now = index, evaluation
        return evaluation

    # -- parts ------------------------------------------------------------------------------------------------

    def _visit(self, index: int) -> None:
        """Look at a step: afterwards the walk has come to it, or the segment holds it."""
        if not 0 <= index < len(self._plan):
            raise IndexError(f"step {index} of a run of {len(self._plan)} steps")
        if self._walk is not None and self._walk.index == index:
            return
        if self._segment is not None and self._segment.start <= index < self._segment.stop:
            return
        start, stop = self._part(index)
        from_above = index + 1 == stop or (self._walk is not None and self._walk.index == index + 1)
        if from_above and self._is_walked(start, stop):
            try:
                return self._walk_to(index, start, stop)
            except WalkedAstray:
                raise
            except ReplayDrift:
                self._ways[start] = False
        self._run_part(index)

    def _between(self, index: int) -> tuple[int, int]:
        """The snapshots, or the run's end, around a step."""
        start = max(s for s in self._plan.snapshots if s <= index)
        return start, min((s for s in self._plan.snapshots if s > start), default=len(self._plan))

    def _part(self, index: int) -> tuple[int, int]:
        """The steps around one that are looked at together: all between two snapshots, or as many as have room."""
        first, end = self._between(index)
        start = first + (index - first) // self._length(first, end) * self._length(first, end)
        return start, min(start + self._length(first, end), end)

    def _length(self, first: int, end: int) -> int:
        room = self._room() // self._gradient_bytes
        return end - first if room >= end - first else max(1, min(room // 2, WALK))

    def _room(self) -> int:
        """Bytes for what is held besides `least`."""
        return self.memory - self.least()

    def _is_walked(self, start: int, stop: int) -> bool:
        """Whether a part is walked back: its steps can be undone, and it has no room for all its evaluations."""
        if start not in self._ways:
            known_after = stop in self._plan.snapshots or stop < self._between(start)[1]
            short = self.walks and self._exact and known_after and 1 < stop - start <= WALK
            self._ways[start] = (
                short and can_be_undone(self._update, self._plan.step(start).hyper) and not self._keeps_all(start, stop)
            )
        return self._ways[start]

    def _keeps_all(self, start: int, stop: int) -> bool:
        """Whether a part can be run forward with all its states and evaluations kept."""
        room = self._room() - (stop - start) * (self._gradient_bytes + self._state_bytes)
        return room > 0 and (stop - start) * self._size_of_an_evaluation(start) <= room

    @property
    def evaluation_bytes(self) -> int:
        """What it takes to keep the evaluation of a step."""
        return self._size_of_an_evaluation(0)

    def _size_of_an_evaluation(self, index: int) -> int:
        if self._evaluation_bytes is None:
            self.evaluated += 1
            with _told_at(index):
                self._evaluation_bytes = self._evaluator.nbytes(self._plan.step(index), self._state_at(index))
        return self._evaluation_bytes

    def _state_at(self, index: int) -> State:
        """The state where a part begins or ends."""
        first, end = self._between(index)
        if index in self._plan.snapshots:
            return self._plan.snapshot(index)
        if self._segment is not None and index == self._segment.stop:
            return self._segment.state(index)
        self._known = {i: s for i, s in self._known.items() if first < i < end}
        nearest = max((i for i in self._known if i <= index), default=first)
        state = self._known.get(nearest) or self._plan.snapshot(first)
        every = self._known_every(first, end)
        for i in range(nearest, index):
            planned = self._plan.step(i)
            gradients, buffers = self._gradients(i, state)
            state = state_after(self._update, self._outline(i, planned, state, gradients), state, buffers)
            if every and (i + 1 - first) % every == 0 and i + 1 < end:
                self._known[i + 1] = state
        return state

    def _known_every(self, first: int, end: int) -> int:
        """After how many steps a state is held while the run goes forward to a part; 0 for never."""
        length = self._length(first, end)
        held = (self._room() - length * self._gradient_bytes) // self._state_bytes
        return length * -(-(end - first) // (length * (held + 1))) if held > 0 else 0

    # -- forward ----------------------------------------------------------------------------------------------

    def _run_part(self, index: int) -> Segment:
        start, stop = self._part(index)
        if self._segment is None or self._segment.start != start:
            state = self._state_at(start)
            self._release()
            self._segment = self._run(start, stop, state)
        return self._segment

    def _run(self, start: int, stop: int, state: State) -> Segment:
        steps = range(start, stop)
        held, saved = self._held_of(start, len(steps)) if len(steps) > 1 else (1, 0)
        segment = Segment(self._update, start, state, every=held)
        for index in tqdm(steps, desc="replay", unit="step", delay=2, leave=False, disable=not self._progress):
            planned, before = self._plan.step(index), segment.state(index)
            if len(segment.evaluations) < saved or index + 1 == stop:
                evaluation = self._evaluate(index, before)
                gradients, buffers = evaluation.gradients, evaluation.buffers
                if len(segment.evaluations) < saved:
                    segment.evaluations[index] = evaluation
                else:
                    self._now = index, evaluation
            else:
                gradients, buffers = self._gradients(index, before)
            segment.append(self._outline(index, planned, before, gradients), buffers)
        if stop in self._plan.snapshots:
            first = self._between(start)[0]
            begun = state.parameters if first == start else self._plan.parameters(first)
            self._check_arrival(first, stop, begun, segment)
        return segment

    def _held_of(self, start: int, steps: int) -> tuple[int, int]:
        """Of a part's steps: of how many each the state is held, and of how many the evaluation is kept."""
        room = max(0, self._room() - steps * self._gradient_bytes)
        one = max(1, self._size_of_an_evaluation(start))
        if room >= steps * (self._state_bytes + one):
            return 1, steps
        states = int(_OF_STATES * room) // self._state_bytes
        return -(-steps // states) if states else steps + 1, (room - states * self._state_bytes) // one

    def _check_arrival(self, start: int, stop: int, begun: Mapping[str, Tensor], segment: Segment) -> None:
        arrived, expected = segment.state(stop), self._plan.parameters(stop)
        self.drift[stop] = distance(arrived.parameters, expected) / max(distance(begun, expected), 1e-30)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in expected.values())
        if not self.drift[stop] <= (_TOLERANCE_HALF if half else _TOLERANCE):  # also where it is not a number
            last, before = self._plan.step(stop - 1), segment.state(stop - 1)
            passes, recorded = self._evaluator.passes, self._plan.snapshot(stop)
            raise ReplayDrift(
                f"steps {start} to {stop - 1}: the replay misses the snapshot before step {stop} by {self.drift[stop]:.2g} of "
                f"the way it went. {difference_on_arrival(passes, self._plan, last, before, arrived, recorded)}"
            )

    # -- backward ---------------------------------------------------------------------------------------------

    def _walk_to(self, index: int, start: int, stop: int) -> None:
        """Undo the step after which the walk is, or at which it begins."""
        if index + 1 == stop:
            state = self._state_at(stop)
            self._release()
            self._walk, self._begun = WalkBack(self._update, stop, state), state.parameters
        walk, planned = self._walk, self._plan.step(index)
        assert walk is not None
        self._walk = self._walked = self._now = None  # nothing to be looked at, should the step not be undone
        state = walk.parameters(planned.hyper)
        evaluation = self._evaluate(index, state)
        record = self._outline(index, planned, state, evaluation.gradients, _WALK_NORM_TOLERANCE)
        walk.arrive(record, evaluation.buffers)
        self._walk, self._walked, self._now = walk, record, (index, evaluation)
        if index == start:
            self._check_walk(start, stop, walk.state)

    def _check_walk(self, start: int, stop: int, arrived: State) -> None:
        """Hold the end of a walk against the state that it should have come to, where that is known."""
        at_snapshot = start in self._plan.snapshots
        if not at_snapshot and start not in self._known:
            return
        expected = self._plan.parameters(start) if at_snapshot else self._known[start].parameters
        missed = distance(arrived.parameters, expected) / max(distance(self._begun, expected), 1e-30)
        if at_snapshot:
            self.drift[start] = missed
        if not missed <= _WALK_TOLERANCE:  # also where it is not a number
            raise WalkedAstray(
                f"steps {stop - 1} to {start}: walked back, they miss the state before step {start} by {missed:.2g} of the way."
            )

    # -- one step ---------------------------------------------------------------------------------------------

    def _evaluate(self, index: int, state: State) -> Evaluation:
        self.evaluated += 1
        with _told_at(index):
            return self._evaluator.evaluate(self._plan.step(index), state)

    def _gradients(self, index: int, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.evaluated += 1
        with _told_at(index):
            return self._evaluator.gradients(self._plan.step(index), state)

    def _outline(
        self,
        index: int,
        planned: PlannedStep,
        state: State,
        gradients: Mapping[str, Tensor],
        tolerance: float = _NORM_TOLERANCE,
    ) -> StepRecord:
        """A step's record without moments, its gradient held against the norm that the run had."""
        norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients.values()])))
        recorded = planned.clip.raw_norm
        if recorded and not math.isfinite(norm):
            # by itself each may be finite, and only their norm not
            wrong = max(gradients, key=lambda k: float(gradients[k].double().norm().nan_to_num(math.inf, math.inf)))
            raise ReplayDrift(
                f"step {index}: the replayed gradient of {wrong} is not finite, the recorded one had norm {recorded:.6g}. "
                + difference(self._evaluator.passes, self._plan, planned, state)
            )
        if recorded and abs(norm - recorded) > (_NORM_TOLERANCE if self._evaluator.half else tolerance) * recorded:
            raise ReplayDrift(
                f"step {index}: the replayed gradient has norm {norm:.6g}, the recorded one had {recorded:.6g}. "
                + difference(self._evaluator.passes, self._plan, planned, state)
            )
        return StepRecord(
            index=index,
            sample_ids=planned.sample_ids,
            loss_weights=planned.loss_weights,
            micro_batch_numbers=planned.micro_batch_numbers,
            gradients={k: g.flatten() for k, g in gradients.items() if k in planned.hyper},
            moments={},
            hyper=planned.hyper,
            averaged=planned.averaged,
            clip=Clip(planned.clip.rule, planned.clip.bound, norm),
        )


@contextmanager
def _told_at(index: int) -> Iterator[None]:
    """What a module's own training step raises when it is run again, as an error that says where.

    Raises:
        ReplayDrift: in the place of what was raised, unless that is for want of memory.
    """
    try:
        yield
    except (InfluenceError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ReplayDrift(
            f"step {index} cannot be run again ({type(error).__name__}: {error}). In the run it could be, so the module, its code or "
            "the data given is another; give those of the run."
        ) from error
