"""Hugging Face models' cases, and how one is measured: one model on "seqkern", "sdpa" and "eager" attention.

Models of two layers from random configs, BERT's (all tokens) and GPT-2's (causal), without dropout; inputs
are vectors, so that no embedding is measured. All but attention is transformers' own in all three: a ratio
says what a user gains, not what attention gains. Output at padding counts for nothing.

Letters: B batch, L tokens, E width of the model, N heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from bench import harness, parity

FAMILY = "huggingface"
PEERS = ("sdpa", "eager")
LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. padded: lengths are uniform in L/8 … L, given as attention_mask, padding on the right."""

    name: str
    model: str
    B: int
    L: int
    E: int
    N: int
    padded: bool = True

    def describe(self) -> str:
        return f"{self.model} {self.B}, {self.L}, {self.E}, {self.N}{', padded' * self.padded}"

    def lengths(self) -> torch.Tensor:
        """[B] int64, the longest L."""
        if not self.padded:
            return torch.full((self.B,), self.L)
        lengths = torch.randint(
            self.L // 8, self.L + 1, (self.B,), generator=torch.Generator().manual_seed(9)
        )
        lengths[0] = self.L
        return lengths

    def flops(self, part: str) -> int:
        """Of the products with weights, of all tokens, and of attention among those that are no padding."""
        passes = {"forward": 1, "backward": 2, "training": 3}[part]
        share = 2 if self.model == "gpt2" else 1
        attention = 4 * self.E * int(self.lengths().square().sum()) // share
        return passes * LAYERS * (24 * self.B * self.L * self.E**2 + attention)

    def scaled(self, family: str, flops: float) -> Case:
        """The same case, cut so that a check of it takes about a second."""
        return dataclasses.replace(self, L=min(self.L, 32), B=min(self.B, 4))


CASES = (
    Case("bert-l128", "bert", 16, 128, 256, 4),
    Case("bert-l512", "bert", 8, 512, 256, 4),
    Case("bert-l128-full", "bert", 16, 128, 256, 4, padded=False),
    Case("gpt2-l512", "gpt2", 8, 512, 256, 4),
    Case("gpt2-l512-full", "gpt2", 8, 512, 256, 4, padded=False),
)
TARGET = 1.0  # of sdpa's time, in padded batches


def make(case: Case, implementation: str) -> torch.nn.Module:
    import transformers

    from seqkern.integrations import huggingface

    huggingface.register()
    torch.manual_seed(1)
    if case.model == "bert":
        config = transformers.BertConfig(
            hidden_size=case.E,
            num_attention_heads=case.N,
            num_hidden_layers=LAYERS,
            intermediate_size=4 * case.E,
            max_position_embeddings=case.L,
            vocab_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel._from_config(
            config, attn_implementation=implementation, add_pooling_layer=False
        )
    config = transformers.GPT2Config(
        n_embd=case.E,
        n_head=case.N,
        n_layer=LAYERS,
        n_positions=case.L,
        vocab_size=8,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return transformers.GPT2Model._from_config(config, attn_implementation=implementation)


class Problem:
    """x [B, L, E] and its mask from a fixed seed; three models with equal parameters."""

    def __init__(self, library: object, family: str, dtype: torch.dtype, case: Case, device: str) -> None:
        self.dtype, self.case, self.device = dtype, case, device
        with torch.random.fork_rng(devices=[]):
            self.models = {
                name: make(case, name).to(device=device, dtype=dtype) for name in (*PEERS, "seqkern")
            }
        for model in self.models.values():  # not used with vectors as inputs
            model.get_input_embeddings().weight.requires_grad_(False)
        generator = torch.Generator().manual_seed(2)
        shape = (case.B, case.L, case.E)
        self.x, self.dy = (
            torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(2)
        )
        self.valid = (torch.arange(case.L) < case.lengths()[:, None]).to(device)
        self.dy *= self.valid[:, :, None]

    def call(self, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        mask = self.valid.long() if self.case.padded else None
        return model(inputs_embeds=x, attention_mask=mask).last_hidden_state

    @staticmethod
    def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def steps(self, mode: str) -> dict[str, Callable[[], dict[str, float]]]:
        steps: dict[str, Callable[[], dict[str, float]]] = {}
        x = self.x.detach().requires_grad_(mode != "forward")
        for name, model in self.models.items():
            call = functools.partial(self.call, model, x)
            if mode == "forward":
                steps[name] = functools.partial(harness.timed_forward, call, self.device)
            else:
                leaves = [x, *self.weights(model).values()]
                steps[name] = functools.partial(harness.timed_training, call, leaves, self.dy, self.device)
        return steps

    def results(self, model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = model.to(dtype)
        x = self.x.detach().to(dtype).requires_grad_()
        y = self.call(model, x) * self.valid[:, :, None]
        leaves = {"x": x, **self.weights(model)}
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype), materialize_grads=True)
        found = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        if (
            self.case.model == "bert"
        ):  # a key's bias moves all scores of a query alike: its gradient is rounding
            found = {name: grad for name, grad in found.items() if not name.endswith("self.key.bias")}
        else:  # of query, key and value in one
            E = self.case.E
            for name in found:
                if name.endswith("attn.c_attn.bias"):
                    found[name] = torch.cat([found[name][:E], found[name][2 * E :]])
        model.to(self.dtype)
        return {"y": y.detach(), **found}

    def gate(self) -> dict[str, parity.Parity]:
        wide = parity.REFEREE[self.dtype]
        referee = self.results(self.models["eager"], wide)
        peer = self.results(self.models["eager"], self.dtype)
        where = f"{self.case.name} {self.dtype}"
        got = self.results(self.models["seqkern"], self.dtype)
        return {"seqkern": parity.compare(got, peer, referee, self.dtype, self.case.L, where)}


def entries(
    interleaved: harness.Interleaved, problem: Problem, gates: dict[str, parity.Parity]
) -> Iterator[dict[str, object]]:
    """The JSON entries: one a part."""
    case, dtype = problem.case, str(problem.dtype).removeprefix("torch.")
    for part in interleaved.seconds["seqkern"]:
        peers = {name: interleaved.spread(name, part).to_json() for name in PEERS}
        ours = interleaved.spread("seqkern", part).to_json()
        best = min(peers, key=lambda name: peers[name]["median"])
        yield {
            "id": f"{FAMILY}-{dtype}-{case.name}-{part}",
            "family": FAMILY,
            "level": FAMILY,
            "dtype": dtype,
            "case": case.name,
            "mode": part,
            "shape": case.describe(),
            "peers": peers,
            "best": best,
            "seqkern": ours,
            "ratio": float(f"{peers[best]['median'] / ours['median']:.4g}"),
            "verdict": harness.verdict(peers[best], ours),
            "gflops": float(f"{case.flops(part) / ours['median'] / 1e9:.4g}"),
            "best_gflops": float(f"{case.flops(part) / peers[best]['median'] / 1e9:.4g}"),
            "parity": gates["seqkern"].to_json(),
        }
