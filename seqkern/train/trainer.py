"""The loop that every recipe runs: updates, evaluations, checkpoints, early stopping, in one process or many.

task.batches.epoch(…)       this process's rows of each batch, and their weights (numbers of targets)
  → Trainer.update          forward and backward of `accumulate` batches, clip, optimizer's step
    → task.loss             the sum over the targets; divided by how many there are in the whole update
task.evaluate               figures of the validation data, of which task.metric chooses the best
OUT/last.pt, best.pt        all that the run needs to go on; the model that did best, with its vocabulary
OUT/log.jsonl, curves.png   what happened
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seqkern.train import checkpoint, distributed
from seqkern.train.batches import Batches, Weighted, to_device
from seqkern.train.checkpoint import CheckpointError
from seqkern.train.config import Training
from seqkern.train.distributed import World
from seqkern.train.log import Log, draw
from seqkern.train.optim import learning_rate_factor, make_optimizer
from seqkern.train.progress import Progress

# Options in which a resumed run may differ from the one before: how long it goes on, what it writes when.
MAY_CHANGE = {"epochs", "minutes", "patience", "log_every", "save_every", "evaluate_every"}


class Task:
    """A model, what it learns from, and how it is judged.

    model:     called by `loss` and `evaluate` only
    metric:    the name of the figure, among those of `evaluate`, that chooses the best model
    minimise:  whether less of it is better
    epoch:     the one that is trained, from 0: set by the Trainer
    """

    model: nn.Module
    batches: Batches
    metric: str
    minimise: bool = False
    epoch: int = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, summed over its targets."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The figures of the validation data; called in eval mode, without gradients."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """Plain values that make the model usable again: config, vocabularies. In every checkpoint."""
        return {}

    def start_epoch(self) -> None:
        """Called before the first batch of each epoch."""

    def carried(self) -> Any:
        """Tensors that one batch's loss leaves to the next one's, as a language model's state."""

    def carry(self, value: Any) -> None:
        """Puts back what `carried` returned, on the CPU; None where there is nothing."""


class _Loss(nn.Module):
    """task.loss as a forward, which is what DDP and FSDP2 hook."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._loss = task.loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


@dataclass
class Position:
    """Where a run is, in numbers that a checkpoint holds."""

    epoch: int = 0
    batch: int = 0  # of the epoch
    step: int = 0  # updates made
    seconds: float = 0.0  # spent so far, evaluations and interrupted runs' share included
    evaluating: float = 0.0  # seconds of these spent on evaluations
    last_evaluation: float = 0.0  # seconds that the last one took
    targets: float = 0.0  # learned from so far
    figures: dict[str, float] = field(default_factory=dict)  # of the best evaluation
    best_step: int = -1
    worse: int = 0  # evaluations since the best one
    done: bool = False
    loss: float = 0.0  # this process's, summed since the last line of the log
    loss_targets: float = 0.0  # of all processes
    loss_seconds: float = 0.0  # when that line was written


@dataclass(frozen=True)
class Result:
    """figures: of the best evaluation, at update best_step;  targets_per_second: without evaluations"""

    figures: dict[str, float]
    best_step: int
    steps: int
    seconds: float
    targets_per_second: float


class Trainer:
    """Trains `task.model` as `config` says; `fit` does it all.

    Args:     out: the folder of checkpoints, log and curves; None keeps none
              world: the processes that train together (`distributed.join`)
    Raises:   ValueError: options that exclude each other, or that this model or machine cannot have
    """

    def __init__(
        self,
        task: Task,
        config: Training,
        *,
        out: Path | None = None,
        world: World | None = None,
        label: str = "training",
    ) -> None:
        if config.fsdp and config.average:
            raise ValueError("average: expected 0 with fsdp, whose parameters are in pieces")
        self.task = task
        self.config = config
        self.out = out
        self.world = world or World()
        self.device = self.world.device
        self.label = label
        self.at = Position()
        self.log = Log(out / "log.jsonl" if out and self.world.leads else None)
        task.model.to(self.device)
        module = _Loss(task, task.model)
        if config.fsdp:
            whole = copy.deepcopy(task.model)  # what is evaluated and saved as the best
            distributed.shard(module, self.world)
            self.module: nn.Module = module
            self.evaluated: nn.Module = whole
        else:
            self.module = distributed.replicate(module, self.world)
            self.evaluated = task.model
        self.model = module.model
        self.average = AveragedModel(self.model, multi_avg_fn=self._mix) if config.average else None
        if self.average is not None:
            self.evaluated = self.average.module
        self.optimizer = make_optimizer(self.model, config)
        self.plateau = None
        if config.schedule == "plateau":
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimizer,
                "min" if task.minimise else "max",
                factor=config.plateau_factor,
                patience=config.plateau_patience,
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        # Of the batches since the last line of the log: on the device, so that nothing waits for them.
        self._losses: list[Tensor] = []
        self._best: dict[str, Tensor] = {}
        # From here on, each process draws its own numbers; the parameters were drawn before, the same in all.
        torch.manual_seed(config.seed + self.world.rank)

    # ---- the loop --------------------------------------------------------------------------------------

    def fit(self, *, resume: bool = False) -> Result:
        """Trains until epochs, minutes or patience are over; the task's model is then the best one.

        Args:     resume: go on from the last checkpoint in `out`
        Raises:   CheckpointError: none there, or another run's; FloatingPointError: the loss is not finite
        """
        if resume:
            self.load()
        config, at = self.config, self.at
        self.log.write("resume" if resume else "start", step=at.step, config=dataclasses.asdict(config))
        self._started, self._seconds_before = time.perf_counter(), at.seconds
        self._note = ""
        at.done = at.epoch >= config.epochs
        while not at.done:
            self.task.epoch = at.epoch
            if at.batch == 0:
                self.task.start_epoch()
            label = f"{self.label} {at.epoch + 1}/{config.epochs}"
            stream = None if self.world.leads else io.StringIO()
            with Progress(label, len(self.task.batches), stream=stream) as bar:
                for group, is_last in self._groups():
                    self._update(group)
                    self._report(bar)
                    over = at.seconds + at.last_evaluation >= 60 * config.minutes
                    if is_last:
                        at.epoch, at.batch = at.epoch + 1, 0
                    at.done = over or at.epoch >= config.epochs
                    due = config.evaluate_every and at.step % config.evaluate_every == 0
                    if is_last or at.done or due:
                        self._evaluate()
                    elif config.save_every and at.step % config.save_every == 0:
                        self.save()
                    if at.done:
                        break
        return self._finish()

    def _groups(self) -> Iterator[tuple[list[Weighted], bool]]:
        """What is left of this epoch, `accumulate` batches at a time, and whether these are the last."""
        rest = self.task.batches.epoch(
            self.at.epoch, start=self.at.batch, rank=self.world.rank, size=self.world.size
        )
        group = list(itertools.islice(rest, self.config.accumulate))
        while group:
            ahead = list(itertools.islice(rest, self.config.accumulate))
            yield group, not ahead
            group = ahead

    def _update(self, group: list[Weighted]) -> None:
        """One step of the optimizer on the gradient of the mean loss over all targets of all processes."""
        config, at, leads = self.config, self.at, self.world.leads
        self.model.train()
        # The leader's clock is everyone's.
        targets, at.seconds = self.world.sum(sum(weight for _, weight in group), leads and self._elapsed())
        progress = max(at.step / self._total_steps(), at.seconds / (60 * config.minutes))
        warmup = min(config.warmup, self._total_steps() // 5)
        factor = learning_rate_factor(config.schedule, warmup, at.step, progress)
        if self.plateau is None or at.step < warmup:
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = config.lr * factor
        self.optimizer.zero_grad()
        losses = []
        for i, (batch, weight) in enumerate(group):
            with distributed.synchronised(self.module, i == len(group) - 1):
                with self._autocast():
                    loss = self.module(to_device(batch, self.device))
                if not weight:  # a part filled for its process's sake
                    loss = loss * 0
                # DDP and FSDP2 take the mean over the processes; what is wanted is the sum.
                self.scaler.scale(loss * (self.world.size / max(targets, 1))).backward()
            losses.append(loss.detach().float())
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        at.step += 1
        at.batch += len(group)
        at.targets += targets
        at.loss_targets += targets
        self._losses += losses

    def _elapsed(self) -> float:
        """Seconds spent on this run so far, those before it was resumed included."""
        return self._seconds_before + time.perf_counter() - self._started

    def _total_steps(self) -> int:
        return self.config.epochs * math.ceil(len(self.task.batches) / self.config.accumulate)

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp != "off")

    def _mix(self, averages: Any, values: Any, n: Any) -> None:
        """An exponential moving average, of a shorter memory over the first updates."""
        decay = min(self.config.average, (1 + float(n)) / (10 + float(n)))
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value.to(average.dtype), 1 - decay)

    def _report(self, bar: Progress) -> None:
        """Shows and logs the mean loss and the rate, every `log_every` updates and at the first."""
        at = self.at
        if at.step % self.config.log_every == 0 or at.step == 1:
            self._collect()
            (loss,) = self.world.sum(at.loss)
            mean = loss / max(at.loss_targets, 1)
            now = self._elapsed()
            rate = at.loss_targets / max(now - at.loss_seconds, 1e-9)
            lr = self.optimizer.param_groups[0]["lr"]
            at.loss, at.loss_targets, at.loss_seconds = 0.0, 0.0, now
            self._note = f"loss {mean:.4g}, {rate:,.0f} targets/s"
            self.log.write("step", step=at.step, epoch=at.epoch, loss=mean, lr=lr, rate=rate, seconds=now)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"loss: {mean} before update {at.step}; a smaller lr ({lr:g}) or clip may help"
                )
        bar.update(min(at.batch, bar.total), self._note)

    def _collect(self) -> None:
        """Waits for the losses on the device and adds them up."""
        if self._losses:
            self.at.loss += torch.stack(self._losses).double().sum().item()
            self._losses = []

    # ---- evaluation and checkpoints --------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Judges the model, keeps it if it is the best so far, and saves where the run is."""
        at, task = self.at, self.task
        begin = time.perf_counter()
        if self.config.fsdp:
            self.evaluated.load_state_dict(distributed.full_state(self.model))
        self.evaluated.eval()
        with torch.no_grad():
            figures = task.evaluate(self.evaluated)
        # What the leader found decides for all, to the last bit.
        figures, at.last_evaluation = self.world.gather((figures, time.perf_counter() - begin))[0]
        value = figures[task.metric]
        best = at.figures.get(task.metric, math.inf if task.minimise else -math.inf)
        is_best = not at.figures or (value < best if task.minimise else value > best)
        if is_best:
            at.figures, at.best_step, at.worse = figures, at.step, 0
            self._best = {k: v.detach().cpu().clone() for k, v in self.evaluated.state_dict().items()}
        else:
            at.worse += 1
        if self.plateau is not None:
            self.plateau.step(value)
        at.done = at.done or 0 < self.config.patience <= at.worse
        at.seconds = self._elapsed()
        at.evaluating += at.last_evaluation
        at.loss_seconds += at.last_evaluation
        self.log.write(
            "evaluation", step=at.step, epoch=at.epoch, best=is_best, seconds=at.seconds, **figures
        )
        if self.world.leads:
            line = ", ".join(f"{name} {figure:.4g}" for name, figure in figures.items())
            print(f"{self.label}: update {at.step}: {line}{' (best)' if is_best else ''}", flush=True)
            if is_best and self.out:
                state = {"model": self._best, "step": at.step, "figures": figures}
                checkpoint.save(self.out / "best.pt", task.description() | state)
        self.save()

    def save(self) -> None:
        """Writes all that a resumed run needs."""
        if self.out is None:
            return
        self._collect()
        mine = {"rng": checkpoint.rng_state(), "carried": self.task.carried(), "loss": self.at.loss}
        state = self.task.description() | {
            "at": dataclasses.asdict(self.at),
            "plateau": self.plateau and self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": self.world.gather(mine),
        }
        if self.config.fsdp:
            distributed.save_sharded(
                self.out / "last", self.at.step, self.module, self.optimizer, state, self.world
            )
        elif self.world.leads:
            state["model"] = self.model.state_dict()
            state["average"] = self.average and self.average.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
            checkpoint.save(self.out / "last.pt", state)

    def load(self) -> None:
        """Goes back to what `save` wrote last; with as many processes, on a CPU, to the same bits.

        Another number of processes draws other random numbers and starts from no carried state.

        Raises:   CheckpointError: no checkpoint, a damaged one, or one of another model, data or options
        """
        if self.out is None:
            raise CheckpointError("resume: expected a folder `out` with a checkpoint, got None")
        path = self.out / "last.pt"
        if self.config.fsdp:
            newest = distributed.newest_sharded(self.out / "last")
            if newest is None:
                raise CheckpointError(f"checkpoint: no complete one below {self.out / 'last'}")
            path = newest
            state = distributed.load_sharded(path, self.module, self.optimizer)
        else:
            state = checkpoint.load(path)
        self._check_same_run(path, state)
        try:
            if not self.config.fsdp:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.plateau is not None:
                self.plateau.load_state_dict(state["plateau"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint: {path} does not fit this model: {error}") from error
        self.at = Position(**state["at"])
        if self.at.figures:
            self._best = checkpoint.load(self.out / "best.pt")["model"]
        processes = state["processes"]
        if len(processes) == self.world.size:
            mine = processes[self.world.rank]
            checkpoint.set_rng_state(mine["rng"])
            self.at.loss = mine["loss"]
            self.task.carry(to_device(mine["carried"], self.device))
        else:
            torch.manual_seed(self.config.seed + self.world.rank + self.at.step)
            self.at.loss = sum(one["loss"] for one in processes) / self.world.size
            self.task.carry(None)

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        wanted = self.task.description()
        for key, value in wanted.items():
            found = state.get(key)
            if key == "config" and isinstance(found, dict):
                differ = {k for k in value.keys() | found.keys() if value.get(k) != found.get(k)} - MAY_CHANGE
                if differ:
                    raise CheckpointError(
                        f"checkpoint: {path} was made with other {', '.join(sorted(differ))}"
                    )
            elif found != value:
                raise CheckpointError(f"checkpoint: {path} was made with another {key}")

    def _finish(self) -> Result:
        at = self.at
        self.evaluated.load_state_dict(self._best)
        self.task.model = self.evaluated.eval()
        rate = at.targets / max(at.seconds - at.evaluating, 1e-9)
        result = Result(at.figures, at.best_step, at.step, at.seconds, rate)
        self.log.write("end", **{**dataclasses.asdict(result), **at.figures})
        if self.out and self.world.leads:
            try:
                draw(self.out / "log.jsonl", self.out / "curves.png")
            except ImportError as error:
                print(f"curves: not drawn: {error}")
        return result
