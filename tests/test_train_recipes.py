"""The recipes and the commands, on corpora made by rule: each learns, and its checkpoint does what it did.

Sizes are a few dozen units, so that a training takes about a second.
"""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import seqkern
from seqkern.__main__ import main as seqkern_main
from seqkern.text import CorpusError, toy
from seqkern.train import checkpoint, commands
from seqkern.train import log as logs
from seqkern.train.config import describe, with_options
from seqkern.train.recipes import RECIPES, restore
from seqkern.train.recipes._recipe import find

SMALL = ["hidden_size=32", "embed_dim=32"]
QUICK = [*SMALL, "lr=0.005", "warmup=10", "log_every=10"]
CLASSIFY = [*QUICK, "embed_std=1"]
SENTIMENT = [*CLASSIFY, "average=0", "weight_decay=0"]
SHORT = ["units=400", "average=0.8", "max_len=20", "beam_width=2", "dropout=0"]

# name → (recipe, options); small text files stand in for the standard library, which takes longer to read
CASES: dict[str, tuple[str, list[str]]] = {
    "char-lm": ("char-lm", [*SMALL, "epochs=3", "batch=4", "window=32", "evaluate_every=0", "dropout=0"]),
    "word-lm": ("word-lm", [*SMALL, "epochs=3", "batch=4", "window=16", "lr=0.01", "dropout=0", "clip=1"]),
    "cbow": (
        "word-vectors",
        ["embed_dim=16", "epochs=5", "batch=64", "lr=0.02", "min_freq=1", "subsample=0"],
    ),
    "skip-gram": (
        "word-vectors",
        ["model=skip-gram", "embed_dim=16", "epochs=2", "window=2", "lr=0.02", "min_freq=1", "subsample=0"],
    ),
    "elmo": ("elmo", ["hidden_size=32", "proj_size=16", "filters=4", "epochs=2", "lr=0.01", "min_freq=1"]),
    "lstm": ("sentiment", [*SENTIMENT, "epochs=5", "embedding_dropout=0.1", "min_freq=1", "dropout=0.2"]),
    "gru": ("sentiment", [*SENTIMENT, "model=gru", "epochs=5", "embedding_dropout=0.1", "dropout=0.2"]),
    "lstm-attention": (
        "sentiment",
        [*SENTIMENT, "model=lstm-attention", "epochs=5", "embedding_dropout=0.1"],
    ),
    "gru-attention": ("sentiment", [*SENTIMENT, "model=gru-attention", "epochs=6", "lr=0.01"]),
    "transformer": ("sentiment", [*SENTIMENT, "model=transformer", "epochs=6", "num_layers=1"]),
    "questions": ("questions", [*CLASSIFY, "epochs=2"]),
    "names": ("names", [*CLASSIFY, "epochs=20", "batch=16"]),
    "names-generate": ("names", [*QUICK, "task=generate", "epochs=20", "batch=16", "lr=0.01"]),
    "ner": ("tagger", [*QUICK, "epochs=2", "char_size=16"]),
    "pos": ("tagger", [*QUICK, "task=pos", "epochs=2", "characters=lstm", "char_size=16", "dropout=0.2"]),
    "translate-gru": ("translate", [*QUICK, *SHORT, "epochs=5", "lr=0.02"]),
    "translate-lstm": (
        "translate",
        [*QUICK, *SHORT, "model=lstm", "epochs=6", "num_layers=1", "teacher_forcing=0.9", "lr=0.01"],
    ),
    "translate-transformer": (
        "translate",
        [*QUICK, *SHORT, "model=transformer", "epochs=5", "lr=0.01", "num_layers=1", "num_heads=2"],
    ),
}
TEXTS = {"char-lm", "word-lm", "word-vectors", "elmo"}  # recipes that read plain text


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than these trainings do; tests/test_train_trainer.py has a test of it."""
    monkeypatch.setattr("seqkern.train.trainer.draw", lambda log, picture: None)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with training, validation and test text, of sentences made by rule."""
    folder = tmp_path_factory.mktemp("text")
    for seed, (split, n) in enumerate({"train": 400, "valid": 40, "test": 40}.items()):
        lines = [pair.target for pair in toy.translations(n, seed=seed)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def data_of(recipe: str, text: Path) -> list[str]:
    return ["--data", str(text)] if recipe in TEXTS else []


def made(case: str, text: Path, layers=seqkern.nn):
    """The case's recipe with its data and model."""
    name, options = CASES[case]
    recipe = RECIPES[name].make(with_options(RECIPES[name].config(), options))
    recipe.read(text if name in TEXTS else None)
    recipe.make(layers)
    return recipe


def without_chance(config):
    """The config without what draws numbers in the loss itself, as model.eval() is for the model."""
    still = {"word_dropout": 0, "teacher_forcing": 1}
    return with_options(config, [f"{key}={value}" for key, value in still.items() if hasattr(config, key)])


# ---- losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in ("char-lm", "word-lm")])
def test_a_loss_is_a_sum_over_its_examples(case, text):
    """What gradient accumulation and several processes rest on; and padding plays no part."""
    recipe = made(case, text)
    recipe.model.double().eval()
    batch, weight = next(recipe.batches.epoch(0))
    parts = [next(recipe.batches.epoch(0, rank=r, size=3)) for r in range(3)]
    assert sum(n for _, n in parts) == weight > 3
    recipe.config = without_chance(recipe.config)
    with torch.no_grad():
        whole = recipe.loss(recipe.model, batch)
        shares = [recipe.loss(recipe.model, part) for part, _ in parts]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-9, atol=0)
    assert whole.item() / weight > 0.1


@pytest.mark.parametrize("case", CASES)
def test_the_model_of_either_library_has_the_same_parameters_and_loss(case, text):
    """What --compare torch rests on."""
    ours = made(case, text)
    theirs = made(case, text, nn)
    state = theirs.model.state_dict()
    assert {k: v.shape for k, v in ours.model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    ours.model.load_state_dict(state)
    batch, _ = next(ours.batches.epoch(0))
    losses = []
    for recipe in (ours, theirs):
        recipe.config = without_chance(recipe.config)
        recipe.model.eval()
        torch.manual_seed(0)
        losses.append(recipe.loss(recipe.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_label_smoothing_is_torchs(text):
    smooth = made("questions", text)
    smooth.config = with_options(smooth.config, ["label_smoothing=0.3", "word_dropout=0"])
    smooth.model.eval()
    (ids, lengths, labels), _ = next(smooth.batches.epoch(0))
    log_p = smooth.model(ids, lengths).log_softmax(1)
    right, uniform = log_p.gather(1, labels[:, None])[:, 0], log_p.mean(1)
    expected = -(0.7 * right + 0.3 * uniform).sum()
    torch.testing.assert_close(smooth.loss(smooth.model, (ids, lengths, labels)), expected)


def test_long_texts_keep_head_and_tail(text):
    recipe = made("questions", text)
    recipe.config = with_options(recipe.config, ["max_tokens=8"])
    tokens = [*recipe.vocabularies["tokens"].tokens[2:14]]
    ids = recipe.vocabularies["tokens"].encode(tokens)
    assert recipe._ids(tokens) == ids[:2] + ids[-6:]
    assert recipe._ids(tokens[:8]) == ids[:8]


# ---- train, evaluate, and use ------------------------------------------------------------------------

# The metric that each case reaches: for nats a bound from above, else from below. Where a figure can be had
# by chance (2 classes, a majority), it is far from it.
REACHED = {
    "char-lm": 1.0, "word-lm": 1.7, "cbow": 2.2, "skip-gram": 2.8, "elmo": 2.6, "lstm": 0.9, "gru": 0.9,
    "lstm-attention": 0.9, "gru-attention": 0.8, "transformer": 0.9, "questions": 0.9, "names": 0.6,
    "names-generate": 2.7, "ner": 0.8, "pos": 0.97, "translate-gru": 0.2, "translate-lstm": 0.2,
    "translate-transformer": 0.5,
}  # fmt: skip


SLOW = {"lstm", "lstm-attention", "gru-attention", "translate-lstm", "translate-transformer"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_a_recipe_learns_and_its_checkpoint_knows_it(case, text, tmp_path, capsys):
    name, options = CASES[case]
    assert commands.train([name, *data_of(name, text), "--out", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    assert figures.pop("recipe") == name and figures.pop("seconds") > 0
    recipe = restore(checkpoint.load(tmp_path / "best.pt"))
    reached = figures[recipe.metric]
    assert reached < REACHED[case] if recipe.minimise else reached > REACHED[case]
    assert not recipe.model.training
    recipe.read(text if name in TEXTS else None)  # the same data: the same vocabularies and figures
    with torch.no_grad():
        again = recipe.figures(recipe.model, recipe.valid, final=True)
    assert again == pytest.approx(figures, rel=1e-5)
    events = {event["event"] for event in logs.read(tmp_path / "log.jsonl")}
    assert events == {"start", "step", "evaluation", "end", "final"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """name of a case → the folder of a short training of it; each is trained once."""
    folders: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in folders:
            name, options = CASES[case]
            folders[case] = tmp_path_factory.mktemp(case)
            torch.set_num_threads(1)
            commands.train([name, *data_of(name, text), "--out", str(folders[case]), *options, "epochs=1"])
        return folders[case]

    return folder


def output(capsys, command: str, *arguments: object) -> str:
    capsys.readouterr()
    assert seqkern_main([command, *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_evaluate_prints_one_json_object(trained, text, tmp_path, capsys):
    folder = trained("char-lm")
    found = json.loads(output(capsys, "evaluate", folder, "--data", text, "--split", "valid"))
    best = checkpoint.load(folder / "best.pt")["figures"]
    assert found == {"recipe": "char-lm", "split": "valid", **{k: pytest.approx(v) for k, v in best.items()}}
    test = json.loads(output(capsys, "evaluate", folder / "best.pt", "--data", text))
    file = json.loads(output(capsys, "evaluate", folder, "--data", text / "test.txt"))
    assert (test["split"], file["split"]) == ("test", "file") and test["nats"] == file["nats"] != found[
        "nats"
    ]
    (tmp_path / "valid.txt").write_bytes((text / "valid.txt").read_bytes())
    no_test = json.loads(output(capsys, "evaluate", folder, "--data", tmp_path))
    assert no_test == found


def test_evaluate_sentiment_on_every_layout(trained, tmp_path, capsys):
    """A tab-separated file with four columns, lines of label and text, and IMDB's folder."""
    folder = trained("lstm")
    reviews = toy.sentiment(40, seed=5)
    (tmp_path / "test.tsv").write_text("".join(f"{r.label}\t8\tid\t{r.text}\n" for r in reviews))
    (tmp_path / "stsa.binary.test").write_text("".join(f"{r.label} {r.text}\n" for r in reviews))
    for i, review in enumerate(reviews):
        place = tmp_path / "aclImdb" / "test" / ("pos" if review.label == "1" else "neg")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}_8.txt").write_text(review.text)
    found = [
        json.loads(output(capsys, "evaluate", folder, "--data", tmp_path / where))
        for where in ("test.tsv", "stsa.binary.test", "aclImdb", "aclImdb/test")
    ]
    for figures in found:
        assert figures["accuracy"] == found[0]["accuracy"]
        assert figures["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


def test_evaluate_where_validation_is_a_part_of_the_training_data(trained, tmp_path, capsys):
    """IMDB's folder has no validation split, a file of pairs none at all."""
    for i, review in enumerate(toy.sentiment(30, seed=5)):
        place = tmp_path / "aclImdb" / "train" / ("pos" if review.label == "1" else "neg")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}_8.txt").write_text(review.text)
    arguments = ("--data", tmp_path / "aclImdb", "--split", "valid")
    found = json.loads(output(capsys, "evaluate", trained("lstm"), *arguments))
    assert found["split"] == "valid" and found["accuracy"] * 6 == pytest.approx(round(found["accuracy"] * 6))

    (tmp_path / "pairs").mkdir()
    lines = [f"{pair.source}\t{pair.target}\n" for pair in toy.translations()[:150]]
    (tmp_path / "pairs" / "pairs.tsv").write_text("".join(lines))
    folder = trained("translate-gru")
    assert json.loads(output(capsys, "evaluate", folder, "--data", tmp_path / "pairs"))["split"] == "valid"
    with pytest.raises(SystemExit):
        output(capsys, "evaluate", folder, "--data", tmp_path / "pairs", "--split", "test")
    assert "no test" in capsys.readouterr().err


def test_predict_reads_arguments_or_lines(trained, capsys, monkeypatch):
    folder = trained("questions")
    asked = ["Where is the castle of Rome ?", "How old is Lima ?", ""]
    rows = [json.loads(line) for line in output(capsys, "predict", folder, *asked).splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked[:2]) + "\n"))
    assert [json.loads(line) for line in output(capsys, "predict", folder).splitlines()] == rows[:2]


def test_predict_of_each_kind(trained, capsys):
    words = ["Emma", "visited", "Kyoto", "yesterday", "."]
    tagged = output(capsys, "predict", trained("ner"), " ".join(words), "")
    first, empty = tagged.splitlines()
    assert [pair.rpartition("/")[0] for pair in first.split()] == words
    tags = set(restore(checkpoint.load(trained("ner") / "best.pt")).vocabularies["tags"].tokens)
    assert {pair.rpartition("/")[2] for pair in first.split()} <= tags and empty == ""
    nearest = json.loads(output(capsys, "predict", trained("cbow"), "man - boy + girl".replace("boy", "dog")))
    assert len(nearest["nearest"]) == 10 and "man" not in dict(nearest["nearest"])
    vectors = json.loads(output(capsys, "predict", trained("elmo"), "a small dog ."))
    assert vectors["words"] == ["a", "small", "dog", "."] and len(vectors["vectors"]) == 4
    assert len(vectors["vectors"][0]) == 32
    translated = output(capsys, "translate", trained("translate-transformer"), "Ein junger Mann .", "Heute .")
    assert len(translated.splitlines()) == 2


def test_generate(trained, capsys):
    written = output(capsys, "generate", trained("char-lm"), "a small", "--length", 30, "--seed", 3)
    assert written.startswith("a small") and len(written) > 30
    assert written == output(capsys, "generate", trained("char-lm"), "a small", "--length", 30, "--seed", 3)
    greedy = {
        output(capsys, "generate", trained("word-lm"), "a small", "--length", 8, "--top-k", 1, "--seed", seed)
        for seed in (0, 1)
    }
    assert len(greedy) == 1
    name = output(capsys, "generate", trained("names-generate"), "Polish K", "--length", 12)
    assert name.startswith("K") and "<" not in name and len(name) <= 14


def test_attention_and_tsne_draw(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for case in ("translate-gru", "lstm-attention"):
        picture = tmp_path / f"{case}.png"
        output(capsys, "attention", trained(case), "the film was dull .", "--out", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
    recipe = restore(checkpoint.load(trained("translate-gru") / "best.pt"))
    with torch.no_grad():
        weights, rows, columns = recipe.attention(recipe.model, "Ein junger Mann .")
    assert weights.shape == (len(rows), len(columns))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(rows)))
    pytest.importorskip("sklearn")
    output(capsys, "tsne", trained("cbow"), "--words", 20, "--out", tmp_path / "tsne.png")
    assert (tmp_path / "tsne.png").read_bytes().startswith(b"\x89PNG")


def test_compare_torch(tmp_path, capsys):
    arguments = ["questions", "--out", str(tmp_path), *CLASSIFY, "epochs=1", "word_dropout=0", "dropout=0"]
    assert commands.train([*arguments, "--compare", "torch"]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    ours, theirs = ([float(x.replace(",", "")) for x in line.split()[1:]] for line in (table[2], table[1]))
    assert ours[0] == theirs[0] > 0.5 and ours[1] == theirs[1]  # no dropout: the same run
    (event,) = (e for e in logs.read(tmp_path / "log.jsonl") if e["event"] == "comparison")
    assert event["ratio"] == pytest.approx(ours[3] / theirs[3], rel=0.05)
    assert event["seqkern"]["accuracy"] == event["torch"]["accuracy"]
    assert f"runs at {event['ratio']:.2f}× the speed of torch.nn" in table[3]
    losses = [
        [e["loss"] for e in logs.read(out / "log.jsonl") if e["event"] == "step"]
        for out in (tmp_path, tmp_path / "torch")
    ]
    shutil.rmtree(tmp_path / "torch")  # killed before the twin began
    commands.train([*arguments, "--compare", "torch", "--resume"])
    again = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[1:3] for line in again[1:3]] == [line.split()[1:3] for line in table[1:3]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) > 2


def test_resume(tmp_path, capsys):
    arguments = ["questions", "--out", str(tmp_path), *QUICK]
    with pytest.raises(SystemExit):
        commands.train([*arguments, "--resume"])
    assert f"no file at {tmp_path / 'last.pt'}" in capsys.readouterr().err
    commands.train([*arguments, "epochs=1"])
    with pytest.raises(SystemExit):
        commands.train([*arguments, "epochs=2", "dropout=0.1", "--resume"])
    assert "was made with other dropout" in capsys.readouterr().err
    commands.train([*arguments, "epochs=2", "--resume"])
    steps = [e["step"] for e in logs.read(tmp_path / "log.jsonl") if e["event"] == "evaluation"]
    assert steps == [29, 58]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "questions", "hidden=3"], "no key 'hidden'; known, with their values: seed=0"),
        (["train", "questions", "dropout"], "expected key=value, got 'dropout'"),
        (["train", "poems"], "invalid choice: 'poems'"),
        (["train", "sentiment", "--data", "/nowhere"], "no file at /nowhere"),
        (["train", "tagger", "--data", "EMPTY"], "no file of the train split (a name such as train…)"),
        (["train", "translate", "--data", "EMPTY"], "a name such as train….de"),
        (["train", "questions", "fsdp=yes", "--out", "EMPTY"], "fsdp: expected to run under torchrun"),
        (["evaluate", "EMPTY", "--data", "EMPTY"], "no file at EMPTY/best.pt"),
        (["evaluate", "QUESTIONS", "--data", "EMPTY"], "no file of the"),
        (["generate", "QUESTIONS", "x"], "a questions checkpoint writes no text"),
        (["predict", "CHARS", "x"], "a char-lm checkpoint predicts nothing about a text"),
        (["attention", "QUESTIONS", "x"], "a questions checkpoint has no attention to draw"),
        (["tsne", "CHARS"], "a char-lm checkpoint has no vectors of whole tokens"),
    ],
    ids=lambda value: "_".join(value[:2]) if isinstance(value, list) else None,
)
def test_errors_of_the_commands(arguments, message, trained, tmp_path, capsys):
    places = {"EMPTY": tmp_path}
    if "QUESTIONS" in arguments:
        places["QUESTIONS"] = trained("questions")
    if "CHARS" in arguments:
        places["CHARS"] = trained("char-lm")
    with pytest.raises(SystemExit) as exit_:
        seqkern_main([str(places.get(argument, argument)) for argument in arguments])
    assert exit_.value.code == 2
    assert message.replace("EMPTY", str(tmp_path)) in capsys.readouterr().err


def test_help_lists_recipes_and_their_options(capsys):
    for arguments, expected in ((["--help"], "word-vectors"), (["tagger", "--help"], "word_dropout=0.15")):
        with pytest.raises(SystemExit):
            commands.train(arguments)
        assert expected in capsys.readouterr().out
    for entry in RECIPES.values():
        for line in describe(entry.config()).splitlines():
            assert len(line.split(maxsplit=1)) == 2, f"an option without a word on it: {line}"


@pytest.mark.parametrize(
    ("split", "name"),
    [
        *(
            ("train", n)
            for n in ("train.tsv.gz", "TREC.train.all", "en_ewt-ud-train.conllu", "wnut17train.conll")
        ),
        *(("valid", n) for n in ("stsa.binary.dev", "devel.tsv", "valid.txt.gz", "val.norm.de", "eng.testa")),
        *(("test", n) for n in ("test.tsv", "emerging.test.annotated", "TREC.test.all", "eng.testb")),
    ],
)
def test_find_reads_a_split_off_a_name(split, name, tmp_path):
    for other in ("README.md", "latest.txt", "trainer.log", "develop.txt", "_train.txt", name):
        (tmp_path / other).touch()
    for asked in ("train", "valid", "test"):
        assert find(tmp_path, asked) == (tmp_path / name if asked == split else None)
    assert find(tmp_path, split, ".nothing") is None
    with pytest.raises(CorpusError, match="no file or folder at"):
        find(tmp_path / "nowhere", split)


# ---- real data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "options", "train", "valid"),
    [
        ("sentiment", "sst2", [], 6920, 872),
        ("questions", "trec", [], 4906, 546),
        ("names", "names", [], 18045, 2005),
        ("tagger", "wnut17", [], 3394, 1009),
        ("tagger", "ncbi_disease", [], 5424, 923),
        pytest.param("tagger", "ud_english_ewt", ["task=pos"], 12544, 2001, marks=pytest.mark.slow),
        pytest.param("sentiment", "imdb", [], 20000, 5000, marks=pytest.mark.slow),
        pytest.param("translate", "multi30k", [], 29000, 1014, marks=pytest.mark.slow),
    ],
)
def test_recipes_read_real_data(name, folder, options, train, valid, data):
    if not (data / folder).is_dir():
        pytest.skip(f"no {folder} under {data}")
    recipe = RECIPES[name].make(with_options(RECIPES[name].config(), options))
    recipe.read(data / folder)
    assert (len(recipe.batches._examples), len(recipe.valid)) == (train, valid)


def test_translate_reads_pairs_in_either_direction(tmp_path):
    pairs = toy.translations(300)
    (tmp_path / "fra.txt").write_text("".join(f"{p.source}\t{p.target}\tsource\n" for p in pairs), "utf-8")
    (tmp_path / "_about.txt").write_text("about\n")
    for options, valid in (([], pairs[::100]), (["swap=yes"], [p[::-1] for p in pairs[::100]])):
        config = with_options(RECIPES["translate"].config(), ["units=400", *options])
        recipe = RECIPES["translate"].make(config)
        recipe.read(tmp_path)
        assert recipe.valid == valid
        assert recipe.read_split(tmp_path, "valid") == valid
        assert len(recipe.read_split(tmp_path / "fra.txt", "test")) == 300


def test_token_vectors_begin_small(text):
    recipe = made("questions", text)
    recipe.config = with_options(recipe.config, ["embed_std=0.1", "embed_dim=200"])
    recipe.make()
    weight = recipe.model.embedding.weight
    assert weight.std().item() == pytest.approx(0.1, rel=0.1) and weight[1].abs().max() == 0


def test_tokens_of_sentiment(text):
    recipe = made("gru", text)
    assert recipe.tokenize("It does n't Work!") == ["it", "does", "n", "'", "t", "work", "!"]
    recipe.config = with_options(recipe.config, ["tokens=spaces"])
    assert recipe.tokenize("It does n't Work!") == ["it", "does", "n't", "work!"]
