"""Small tasks for the tests of seqkern.train, and the program that torchrun starts in them.

As a program: python train_tasks.py OUT TASK [key=value …]; with DIE_AT=N in the environment, a process of a
world that torchrun has not yet restarted kills itself before its Nth update.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkern
from seqkern.text import Windows
from seqkern.train.batches import ExampleBatches, WindowBatches, shuffled
from seqkern.train.config import Training, with_options
from seqkern.train.distributed import World, join, was_restarted
from seqkern.train.tbptt import detach_state
from seqkern.train.trainer import Result, Task, Trainer


class Tagging(Task):
    """The class of each token of a ragged sequence: (token + token before) mod 5. Targets are tokens."""

    metric = "accuracy"

    def __init__(self, config: Training, *, dropout: float = 0.3, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.examples = [
            torch.randint(9, (int(torch.randint(1, 12, (1,), generator=generator)),), generator=generator)
            for _ in range(37)
        ]
        torch.manual_seed(config.seed)
        self.model = Tagger(dropout).to(dtype)
        order = shuffled(len(self.examples), config.batch, config.seed)
        self.batches = ExampleBatches(self.examples, order, self.collate, lambda batch: int(batch[1].sum()))
        self.losses: list[float] = []
        self.config = config

    @staticmethod
    def collate(examples: list[Tensor]) -> tuple[Tensor, Tensor]:
        return nn.utils.rnn.pad_sequence(examples, batch_first=True), torch.tensor([len(e) for e in examples])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, lengths = batch
        logits = model(tokens, lengths)
        loss = F.cross_entropy(logits.mT, self.targets(tokens, lengths), ignore_index=-1, reduction="sum")
        self.losses.append(loss.item())
        return loss

    @staticmethod
    def targets(tokens: Tensor, lengths: Tensor) -> Tensor:
        before = F.pad(tokens, (1, 0))[:, :-1]
        outside = torch.arange(tokens.shape[1]) >= lengths[:, None]
        return ((tokens + before) % 5).masked_fill(outside, -1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        tokens, lengths = self.collate(self.examples)
        targets = self.targets(tokens, lengths)
        logits = model(tokens, lengths)
        loss = F.cross_entropy(logits.mT, targets, ignore_index=-1)
        right = (logits.argmax(-1) == targets)[targets >= 0]
        return {"accuracy": right.float().mean().item(), "loss": loss.item()}

    def description(self):
        return {"recipe": "tagging", "config": vars(self.config).copy()}


class Tagger(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.dropout = nn.Dropout(dropout)
        self.rnn = seqkern.GRU(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.rnn(self.dropout(self.embedding(tokens)), lengths=lengths)
        return self.fc(self.dropout(y))


class Language(Task):
    """A character model that carries its state from window to window."""

    metric = "loss"
    minimise = True

    def __init__(self, config: Training, *, dropout: float = 0.3, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(config.seed)
        self.model = LanguageModel(dropout).to(dtype)
        stream = torch.randint(9, (260,), generator=torch.Generator().manual_seed(3)).cumsum(0) % 9
        self.batches = WindowBatches(Windows(stream, config.batch, 5))
        self.losses: list[float] = []
        self.state = None
        self.config = config

    def start_epoch(self) -> None:
        self.state = None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits, state = model(inputs, self.state)
        self.state = detach_state(state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        self.losses.append(loss.item())
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        inputs, targets = next(self.batches.epoch(0))[0]
        logits, _ = model(inputs, None)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()}

    def description(self):
        return {"recipe": "language", "config": vars(self.config).copy()}

    def carried(self):
        return self.state

    def carry(self, value) -> None:
        self.state = value


class LanguageModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.rnn = seqkern.LSTM(6, 8, 2, dropout=dropout)
        self.fc = nn.Linear(8, 9)

    def forward(self, ids: Tensor, state):
        y, state = self.rnn(self.embedding(ids), state)
        return self.fc(y), state


class Transformed(Tagging):
    """Tagging by a small Transformer, for FSDP2."""

    def __init__(self, config: Training, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.model = TransformerTagger(dropout).to(dtype)


class TransformerTagger(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        layer = seqkern.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.encoder = seqkern.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embedding(tokens), lengths=lengths))


TASKS = {"tagging": Tagging, "language": Language, "transformed": Transformed}


class KilledError(Exception):
    """What stands for a kill inside one process."""


def train(
    task: Task,
    config: Training,
    out: Path | None,
    *,
    die_at: int | None = None,
    resume: bool = False,
    world: World | None = None,
) -> Result:
    """Trains `task`; `KilledError` before the loss number `die_at`, counted from 0."""
    if die_at is not None:
        loss = task.loss

        def mortal(model, batch):
            if len(task.losses) == die_at:
                if "RANK" in os.environ:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KilledError
            return loss(model, batch)

        task.loss = mortal
    return Trainer(task, config, out=out, world=world).fit(resume=resume)


def main(out: str, name: str, *options: str) -> None:
    torch.set_num_threads(1)
    config = with_options(Training(), options)
    with join("cpu") as world:
        restarted = was_restarted(world)
        resume = (restarted or "RESUME" in os.environ) and any(Path(out).glob("last*"))
        task = TASKS[name](config, dropout=0.0)
        die_at = None
        if "DIE_AT" in os.environ and not restarted and world.rank == world.size - 1:
            die_at = int(os.environ["DIE_AT"])
        result = train(task, config, Path(out), die_at=die_at, resume=resume, world=world)
        if world.leads:
            torch.save(
                {
                    "figures": result.figures,
                    "resumed": resume,
                    "size": world.size,
                    "model": task.model.state_dict(),
                },
                Path(out) / "result.pt",
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
