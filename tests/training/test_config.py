from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from copynce.config import build_config, load_config, save_config, section_classes, setting_types
from copynce.data.settings import MixtureData, SupervisedData
from copynce.errors import ConfigError
from copynce.evaluation.settings import EvalConfig
from copynce.models.settings import MatcherConfig
from copynce.training.config import TrainConfig
from copynce.training.objectives.settings import MatcherLossConfig

REQUIRED = ["out=run", "data.train=list.csv"]


def test_file_and_overrides_make_one_typed_config(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {train: a.csv, batch_size: 8}\nout: run\noptim: {lr: 1.0e-4, betas: [0.8, 0.9]}\n")
    config = load_config(TrainConfig, file, ["data.batch_size=16", "model.backbone_options.depth=2", "optim.steps=3"])
    assert config.data.batch_size == 16
    assert config.data.train == "a.csv"
    assert config.optim.lr == pytest.approx(1e-4)
    assert config.optim.betas == (0.8, 0.9)
    assert config.optim.steps == 3
    assert config.model.backbone_options == {"depth": 2}
    assert config.loss.gamma == 3.0  # not named: the released value


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, [*REQUIRED, "model.dim=64", "weights=w.safetensors"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown setting optim\.learning_rate; did you mean"),
        ("data.batchsize=4", r"unknown setting data\.batchsize; did you mean data\.batch_size"),
        ("batch_size=4", r"unknown setting batch_size; did you mean .*data\.batch_size"),
        ("lr=4", r"unknown setting lr; did you mean .*optim\.lr"),
        ("data.batch_size=many", r"data\.batch_size must be a whole number, got 'many'"),
        ("data.batch_size=1", r"data\.batch_size must be at least 2, got 1"),
        ("data.pairs=none", r"data\.pairs must be one of descriptor, matcher, supervised, mixture, got 'none'"),
        (
            "data={pairs: [matcher]}",
            r"data\.pairs must be one of descriptor, matcher, supervised, mixture, got \['matcher'\]",
        ),
        ("data.pairs=matcher", r"data\.pairs must be descriptor or supervised with .*, got matcher: .* copies only"),
        (
            "data.pairs=supervised",
            r"data\.train is a setting of data\.pairs=descriptor or data\.pairs=matcher or data\.pairs=mixture, ",
        ),
        (
            "data.references=r.csv",
            r"data\.references is a setting of data\.pairs=supervised or data\.pairs=mixture, not of data\.pairs=descr",
        ),
        ("objective=ranker", r"objective must be one of descriptor, matcher, got 'ranker'"),
        ("objective=matcher", r"data\.pairs must be matcher or mixture with objective=matcher, got desc"),
        ("model.encoder_blocks=8", r"model\.encoder_blocks is a setting of objective=matcher, not of objective=descr"),
        ("loss.bce_weight=2", r"loss\.bce_weight is a setting of objective=matcher, not of objective=descriptor"),
        ("data.neighbour_columns=7", r"data\.neighbour_columns needs a file of neighbours, data\.neighbours=FILE"),
        ("data.neighbour_columns=0", r"data\.neighbour_columns must be at least 1, got 0"),
        ("data.augment_probability=0.5", r"data\.augment_probability is a setting of data\.pairs=supervised or"),
        ("data.augment_probabilty=0.5", r"unknown setting .*; did you mean data\.augment_probability"),
        ("loss.prior=papr", r"loss\.prior must be one of released, paper, got 'papr'"),
        ("loss.temperature=0.02", r"loss\.temperature must be above 0\.025"),
        ("model.head=pool", r"model\.head must be one of linear_bn, cls, got 'pool'"),
        ("optim.lr=1,5", r"optim\.lr must be a number, got '1,5'"),
        ("optim.lr=nan", r"optim\.lr must be a number"),
        ("optim.lr=.inf", r"optim\.lr must be above 0 and at most 1000, got inf"),
        ("optim.steps=1e3", r"optim\.steps must be a whole number, got '1e3'"),
        ("optim.steps=1" + "0" * 30, r"optim\.steps must be a whole number of at most 63 bits"),
        ("optim.betas=0.9,0.95", r"optim\.betas must be a list of 2 values"),
        ("optim.betas=[0.9]", r"optim\.betas must be a list of 2 values"),
        ("optim.betas=[2,3]", r"optim\.betas must be at least 0 and below 1, got 2"),
        ("optim.min_lr=-1", r"optim\.min_lr must be at least 0"),
        ("optim.min_lr=1", r"optim\.min_lr must be at most optim\.lr, 0\.0006, got 1"),
        ("optim.warmup_epochs=.inf", r"optim\.warmup_epochs must be at least 0 and at most .*, got inf"),
        ("seed=-1", r"seed must be at least 0"),
        ("checkpoint_activations=maybe", r"checkpoint_activations must be true or false"),
        ("ema=1", r"ema must be above 0 and below 1, got 1"),
        ("optim.accumulate=0", r"optim\.accumulate must be at least 1"),
        ("tensorboard=maybe", r"tensorboard must be true or false, got 'maybe'"),
        ("data.max_megapixels=.inf", r"data\.max_megapixels must be .*, got inf"),
        ("data.policy=nope", r"data\.policy must be one of descriptor, .*, got 'nope'"),
        ("data={policy: nope}", r"data\.policy must be one of"),
        ("data={policy: light, policy: matcher}", r"data: .*'policy' is given twice"),
        ("data.train.x=1", r"unknown setting data\.train\.x; did you mean data\.train"),
        ("data.train=", r"data\.train must not be empty"),
        ("weights=", r"weights is empty; give a value, or none"),
        ("loss.log_scale=1000", r"loss\.log_scale must be at least -80 and at most 80"),
        ("loss={copynce_weight: 0, info_nce_weight: 0, koleo_weight: 0}", r"one of loss\.copynce_weight.* above 0"),
        ("model.img_size=33", r"model: img_size must be a multiple of the patch size 16"),
        ("model.img_size=0", r"model\.img_size must be at least 1"),
        ("model.backbone=vit_smal_patch16_224", r"model: backbone .*near names: vit_small_patch16_224"),
        ("model.backbone=vit_base_patch16_siglip_224", r"model: backbone must have a class token"),
        ("model.tokens_block=12", r"model: tokens_block must lie in \[-12, 11\]"),
        ("model.dim=0", r"model\.dim must be at least 1"),
        ("model.dim=1000000000000", r"model: its weights take .* GB"),
        ("model.backbone_options=3", r"model\.backbone_options must be a mapping"),
        ("model.backbone_options={a", r"model\.backbone_options: not a value such as \{name: value\}"),
        ("model.backbone_options={depht: 2}", r"model: backbone_options has no 'depht'; near names: depth"),
        ("model.backbone_options={embed_dim: abc}", r"model: vit_small_patch16_224 cannot be built with .*'abc'"),
        ("model.backbone_options.depth=1000000000", r"model\.backbone_options\.depth must be .* at most 1000"),
        ("=x", r"key=value, got '=x'"),
        ("optim=3", r"optim must be a mapping"),
        ("nonsense", r"key=value, got 'nonsense'"),
    ],
)
def test_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, None, [*REQUIRED, override])


SUPERVISED = ["out=run", "data.queries=q.csv", "data.references=r.csv", "data.ground_truth=gt", "data.pairs=supervised"]


def test_the_settings_of_supervised_pairs_are_their_own(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, [*SUPERVISED, "data.augment_probability=0.5"])
    assert isinstance(config.data, SupervisedData)
    assert (config.data.queries, config.data.augment_probability) == ("q.csv", 0.5)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == config
    with pytest.raises(ConfigError, match=r"data\.ground_truth must be given"):
        load_config(TrainConfig, None, [setting for setting in SUPERVISED if "ground_truth" not in setting])
    with pytest.raises(ConfigError, match=r"data\.augment_probability must be at least 0 and at most 1, got 2"):
        load_config(TrainConfig, None, [*SUPERVISED, "data.augment_probability=2"])
    with pytest.raises(
        ConfigError, match=r"data\.neighbours is a setting of data\.pairs=descriptor or data\.pairs=match"
    ):
        load_config(TrainConfig, None, [*SUPERVISED, "data.neighbours=knn.npy"])


def test_a_matcher_has_its_own_settings_and_defaults(tmp_path: Path) -> None:
    matcher = ["out=run", "objective=matcher", "data.train=list.csv"]
    config = load_config(TrainConfig, None, [*matcher, "data.pairs=matcher", "model.encoder_blocks=6"])
    assert (config.model, config.loss) == (MatcherConfig(encoder_blocks=6), MatcherLossConfig())
    assert (config.data.policy, config.data.batch_size) == ("matcher", 32)
    assert (config.loss.copynce_weight, config.loss.gamma, config.loss.bce_weight) == (3, 1, 1)
    with pytest.raises(
        ConfigError, match=r"loss\.koleo_weight is a setting of objective=descriptor, not of objective=m"
    ):
        load_config(TrainConfig, None, [*matcher, "data.pairs=matcher", "loss.koleo_weight=1"])
    with pytest.raises(ConfigError, match=r"one of loss\.copynce_weight, loss\.bce_weight must be above 0"):
        load_config(TrainConfig, None, [*matcher, "data.pairs=matcher", "loss={copynce_weight: 0, bce_weight: 0}"])

    parts = [*matcher, *(setting for setting in SUPERVISED if "pairs" not in setting), "data.pairs=mixture"]
    config = load_config(TrainConfig, None, [*parts, "data.neighbours=knn.npy", "data.share=0.5"])
    assert isinstance(config.data, MixtureData)
    assert (config.data.train, config.data.queries, config.data.share) == ("list.csv", "q.csv", 0.5)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == config
    for wrong, message in (
        ("data.share=0", r"data\.share must be above 0 and at most 1, got 0"),
        ("data.augment_probability=2", r"data\.augment_probability must be at least 0 and at most 1, got 2"),
        ("data.neighbour_columns=0", r"data\.neighbour_columns must be at least 1, got 0"),
        (
            "objective=descriptor",
            r"data\.pairs must be descriptor or supervised with objective=descriptor, got mixture",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, None, [*parts, wrong])


def test_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.train must be given"):
        load_config(TrainConfig, None, ["out=run"])


def test_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(TrainConfig, tmp_path / "none.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not a YAML file"):
        load_config(TrainConfig, tmp_path / "bad.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a YAML mapping"):
        load_config(TrainConfig, tmp_path / "list.yaml", [])


def test_plain_values_build_a_config() -> None:
    assert build_config(TrainConfig, {"out": "run", "data": {"train": "x"}}).out == "run"


VERBATIM = [
    "runs/exp #2", "2024_11_28", "007", "1e5", "12:30", "0x10", "yes", "null", "~", "~/runs", "[2024] runs", "{a}",
    "a: b", "%x", "@x", "`x", "&x", "!x", "*.tar", '"quoted"', "'q'", "a=b", " spaced ", "${oc.env:HOME}",
    "${nothing}", "{000..003}.tar", "{a,b}.tar", "[ab].tar", "-", "- a", "|x", ">x", "a,b", "?x", "? x", "1.10",
    "a\rb", "a\nb", "a\tb", "été", "\udcff", "2024-11-28", ".inf", "---", "...", "#", "{}", "[]", "'", '"', ":", "a:",
    "\U0001f5bc",
]  # fmt: skip


@pytest.mark.parametrize("text", VERBATIM)
def test_text_on_the_command_line_is_taken_letter_by_letter(text: str, tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, [f"out={text}", f"data.train={text}", f"data.root={text}"])
    assert (config.out, config.data.train) == (text, text)
    assert config.data.root == (None if text in ("null", "~") else text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize(
    "text", ["2024_11_28", "007", "1e5", "12:30", "0x10", "yes", "2024-11-28", "1.10", "0o17", "null", ".inf", "a"]
)
def test_text_in_a_file_is_taken_letter_by_letter(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"out: {text}\ndata: {{train: {text}}}\nweights: '{text}'\n")
    config = load_config(TrainConfig, tmp_path / "config.yaml", [])
    assert (config.out, config.data.train, config.weights) == (text, text, text)


def test_none_and_null_empty_a_setting_that_may_be_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("out: run\ndata: {train: x}\nweights: w.safetensors\nthreads: 3\n")
    for word in ("none", "null", "None"):
        config = load_config(TrainConfig, tmp_path / "config.yaml", [f"weights={word}", f"threads={word}"])
        assert config.weights is None
        assert config.threads is None
    (tmp_path / "config.yaml").write_text("out: run\ndata: {train: x}\nweights: 'none'\nthreads:\n")
    config = load_config(TrainConfig, tmp_path / "config.yaml", [])
    assert config.weights == "none"
    assert config.threads is None


def test_a_later_mapping_replaces_the_one_before_and_a_later_key_one_of_its_values() -> None:
    options = "model.backbone_options={patch_size: 8, embed_dim: 24, num_heads: 2}"
    one_more = load_config(TrainConfig, None, [*REQUIRED, options, "model.backbone_options.depth=2"])
    assert one_more.model.backbone_options == {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    replaced = load_config(TrainConfig, None, [*REQUIRED, options, "model.backbone_options={init_values: 1e-5}"])
    assert replaced.model.backbone_options == {"init_values": 1e-5}
    section = load_config(TrainConfig, None, [*REQUIRED, "data={batch_size: 7}", "data={threads: 3}"])
    assert (section.data.train, section.data.batch_size, section.data.threads) == ("list.csv", 7, 3)


@dataclass(frozen=True, kw_only=True)
class Section:
    word: str = "x"
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Everything:
    text: str
    perhaps: str | None = None
    choice: Literal["a", "yes", "none"] = "a"
    flag: bool = False
    count: int = 0
    limit: int | None = None
    rate: float = 0.0
    pair: tuple[float, float] = (0.0, 0.0)
    options: dict[str, Any] = field(default_factory=dict)
    section: Section


words = st.text(st.characters(exclude_characters="\0"), max_size=20) | st.sampled_from(
    [
        "none",
        "Null",
        "~",
        "yes",
        "off",
        "1_000",
        "1e5",
        ".inf",
        "-.INF",
        "",
        " ",
        "9" * 40,
        "a\nb",
        "\x85",
        "\ud800",
        "=",
        "<<",
    ]
)
whole = st.integers(-(2**63) + 1, 2**63 - 1)
numbers = st.floats(allow_nan=False)
anything = st.recursive(
    st.none() | st.booleans() | whole | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    config=st.builds(
        Everything,
        text=words,
        perhaps=st.none() | words,
        choice=st.sampled_from(["a", "yes", "none"]),
        flag=st.booleans(),
        count=whole,
        limit=st.none() | whole,
        rate=numbers,
        pair=st.tuples(numbers, numbers),
        options=st.dictionaries(words, anything, max_size=4),
        section=st.builds(Section, word=words, ratio=st.none() | numbers),
    )
)
def test_whatever_is_saved_reads_back_equal(config: Everything, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / f"everything-{os.getpid()}.yaml"
    save_config(config, file)
    assert load_config(Everything, file, []) == config
    yaml.safe_load(file.read_text())  # plain YAML for everybody else


@settings(max_examples=300, deadline=None)
@given(text=words, key=st.sampled_from(["text", "section.word"]))
def test_any_text_but_none_is_a_text_setting(text: str, key: str) -> None:
    given = ["text=x", f"{key}={text}"]
    if not text:
        with pytest.raises(ConfigError, match="must not be empty"):
            load_config(Everything, None, given)
    else:
        config = load_config(Everything, None, given)
        assert (config.section.word if "." in key else config.text) == text


NASTY = [
    "nan", "-nan", "inf", "-inf", ".inf", "1e400", "1e308", "1e-400", "-1", "0", "1", "2", "3", "-0.0", "0.5", "1e30",
    "1_0", "0x10", "1,5", "99999999999999999999999", "9223372036854775807", "1000000000000", "true", "no", "null",
    "none", "~", "", "[]", "{}", "[1,2,3]", "[nan, nan]", "[[[]]]", "{a: 1}", "{depth: 2}", "{depth: -1}",
    "{embed_dim: [1]}", "{num_heads: none}", "{patch_size: 3}", "{patch_size: [8, 16]}", "{act_layer: x}",
    "{qk_norm: true}", "{weight_init: x}", "{pos_embed: x}", "{block_fn: 1}", "{mlp_layer: 3}", "{a", "[1", "a: b",
    "*a", "&a b", "!!python/object:os.system x", "!x", "- a", '"', "'", "%", "@", "`", "#", ",", ":", "a\0b", "été",
    "\udcff", "\n", "resnet50", "matcher", "supervised", "auto", "gpu", "../../..", "/", ".",
]  # fmt: skip


def keys(kind: type, prefix: str = "") -> list[str]:
    found: dict[str, None] = {}
    for name, hint in setting_types(kind).items():
        sections = section_classes(hint)
        for section in sections:
            found |= dict.fromkeys(keys(section, f"{prefix}{name}."))
        if not sections:
            found[f"{prefix}{name}"] = None
    return list(found)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (TrainConfig, key)
        for key in [*keys(TrainConfig), "model.backbone_options.depth", "model.backbone_options.img_size"]
    ]
    + [(EvalConfig, key) for key in keys(EvalConfig)],
)
def test_whatever_is_typed_becomes_a_setting_or_a_sentence(kind: type, key: str) -> None:
    required = ["dataset=x"] if kind is EvalConfig else REQUIRED
    for value in NASTY:
        try:
            config = load_config(kind, None, [*required, f"{key}={value}"])
        except ConfigError:
            continue
        found: Any = config
        for name in key.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        assert not (isinstance(found, float) and math.isnan(found))


@pytest.mark.parametrize(
    "content",
    [
        "data: &a {train: x}\nout: y\nloss: *a\n",
        "out: &a [*a]\ndata: {train: x}\n",
        "out: y\ndata: {train: x}\ndata: {train: z}\n",
        "out: !!python/object/apply:os.getcwd []\n",
        "? [a, b]\n: c\n",
        "a: " + "[" * 5000,
        "--- 1\n--- 2\n",
        'out: "\\0"\ndata: {train: x}\n',
    ],
    ids=range(8),
)
def test_a_strange_file_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "strange.yaml").write_text(content)
    with pytest.raises(ConfigError):
        load_config(TrainConfig, tmp_path / "strange.yaml", [])
    (tmp_path / "strange.yaml").write_bytes(b"out: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"strange\.yaml: not a YAML file"):
        load_config(TrainConfig, tmp_path / "strange.yaml", [])


def test_rivals_want_no_more_targets_than_there_are_patches() -> None:
    small = [*REQUIRED, "model.img_size=32", "loss.target=feature"]
    assert load_config(TrainConfig, None, [*small, "loss.neighbours=4"]).loss.neighbours == 4
    with pytest.raises(ConfigError, match=r"loss\.neighbours must be at most 4, the patches of a picture, got 5"):
        load_config(TrainConfig, None, [*small, "loss.neighbours=5"])
