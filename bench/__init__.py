"""Speed one can trust: seqkern against torch.nn, interleaved, on the same inputs, after a parity gate.

pytest bench/                        every case once, scaled down, as a check
pytest bench/ --benchmark            measure; JSON under bench/results/<CPU or GPU model>/
pytest bench/ --benchmark-quick      measure the short cases only, save nothing
python -m bench.report               tables, charts and the README's section, from the JSON
bench/gpu.sh OUT                     everything that wants a GPU, tests included
python -m bench.sync OUT.json        what synchronisation costs a GPU (sync.cu)

cases.py    what is measured: shapes, data types, model FLOPs, targets
parity.py   the gate: outputs and gradients against a wider torch.nn
harness.py  how it is measured: one problem, its subjects, interleaved rounds
limits.py   what the machine could do at best; machine.py: which machine it is
store.py    the JSON; report.py: everything made from the JSON
"""
