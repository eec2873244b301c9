from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from grappa_dist.config import AdaptConfig, Config, DataConfig, FuseConfig, fingerprint, load
from grappa_dist.variants import VARIANTS, Variant, VariantName, at_strength, split_strength

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"name": "x", "data": {"train": "shards"}, "backbone": {"name": "timm:vit_tiny"}}


def config(tmp_path: Path, tree: Any = SMALL, overrides: tuple[str, ...] = ()) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load(path, overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_that_ships_loads(path: Path) -> None:
    assert load(path).name
    assert path.read_text().startswith("# "), "opens with what it is, the command, the hardware and what to expect"


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(tmp_path: Path) -> None:
    tree = {**SMALL, "adapt": {"epochs": 5, "bottleneck": 8}}
    found = config(tmp_path, tree, ("adapt.epochs=7", "fuse.epochs=2", "adapt.epochs=9")).adapt
    assert (found.epochs, found.bottleneck, found.gamma) == (9, 8, AdaptConfig().gamma)


def test_values_of_overrides_are_yaml(tmp_path: Path) -> None:
    found = config(
        tmp_path,
        SMALL,
        (
            "adapt.learning_rate=1e-3",  # a string to YAML 1.1
            "clustering.num_labels=[4, 8]",
            "fuse.refresh=false",
            "backbone.kwargs.img_size=96",
            "backbone.mean=[0.5, 0.5, 0.5]",
            "data.train=elsewhere",
            "resources.workers=3",
            "out=null",
        ),
    )
    assert found.adapt.learning_rate == 0.001
    assert found.clustering.num_labels == (4, 8)
    assert found.fuse.refresh is False
    assert found.backbone.kwargs == {"img_size": 96}
    assert found.backbone.mean == (0.5, 0.5, 0.5)
    assert found.data.train == ("elsewhere",)
    assert (found.resources.workers, found.out) == (3, None)


def test_the_yaml_of_a_config_loads_as_that_config(tmp_path: Path) -> None:
    found = config(tmp_path, {**SMALL, "clustering": {"num_labels": [4, 8]}})
    path = tmp_path / "again.yaml"
    path.write_text(found.yaml())
    assert load(path) == found


WRONG = [
    ("adpt.epochs=1", "unknown key adpt; did you mean 'adapt'?"),
    ("fuse.variants=[averge]", "did you mean 'average'?"),
    ("backbone.resize=squsah", "did you mean 'squash'?"),
    ("evaluate.export=transform", "did you mean 'transforms'?"),
    ("adapt.epoch=1", "unknown key adapt.epoch; did you mean 'epochs'?"),
    ("fuse.zzz=1", "unknown key fuse.zzz; known keys: adam_learning_rate, beta"),
    ("fuse.graph_features=reused", "unknown key fuse.graph_features; known keys: adam_learning_rate, beta"),
    ("adapt.epochs=x", "adapt.epochs='x': Input should be a valid integer"),
    ("adapt.epochs=1.5", "adapt.epochs=1.5: Input should be a valid integer"),
    ("adapt.epochs=0", "adapt.epochs=0: Input should be greater than or equal to 1"),
    ("adapt.learning_rate=-1", "adapt.learning_rate=-1: Input should be greater than or equal to 0"),
    ("adapt.learning_rate=.nan", "adapt.learning_rate=nan: Input should be"),
    ("adapt.learning_rate=.inf", "adapt.learning_rate=inf: Input should be a finite number"),
    ("adapt.min_crop_area=0", "adapt.min_crop_area=0: Input should be greater than 0"),
    ("fuse.min_crop_area=1.5", "fuse.min_crop_area=1.5: Input should be less than or equal to 1"),
    ("fuse.global_batch=1", "fuse.global_batch=1: Input should be greater than or equal to 2"),
    ("clustering.tolerance=1", "clustering.tolerance=1: Input should be less than 1"),
    ("data.max_bad_share=2", "data.max_bad_share=2: Input should be less than or equal to 1"),
    ("data.train=5", "data.train.0=5: Input should be a valid string"),
    ("data=3", "data=3: expected settings below it"),
    ("adapt=", "adapt=null: expected settings below it"),
    ("clustering.num_labels=abc", "clustering.num_labels='abc': Input should be a valid list"),
    ("clustering.num_labels=abc", "clustering.num_labels='abc': Input should be 'auto'"),
    ("clustering.num_labels=[4, a]", "clustering.num_labels.1='a': Input should be a valid integer"),
    ("clustering.num_labels=[8, 4, 8]", "clustering.num_labels must be distinct and not empty, got [8, 4, 8]"),
    ("clustering.num_labels=[]", "clustering.num_labels must be distinct and not empty, got []"),
    ("fuse.variants=[average, average]", "fuse.variants must be distinct and not empty, got ['average', 'average']"),
    ("fuse.variants=[mean]", "fuse.variants.0='mean': Input should be 'average', 'gallery'"),
    ("evaluate.export=oracle", "evaluate.export='oracle': expected one of auto, backbone, average, transforms, ne"),
    ("evaluate.export=k=05", "transforms, neighbours or k=<K> of a set"),
    ("evaluate.export=supervised-set", "evaluate.export='supervised-set': expected one of auto, backbone, average, "),
    (
        "data.collection=a.b:c",
        "give either data.train (folders of images or of shards) or data.collection, got data.train=['shards']",
    ),
    ("data.train=[]", "got data.train=[] and data.collection=None"),
    ("backbone.name=vit_tiny", "backbone.name='vit_tiny': must be <module>:<function>, or timm:<model>"),
    ("backbone.resize=stretch", "backbone.resize='stretch': Input should be 'crop' or 'squash'"),
    ("backbone.mean=[0.5]", "backbone.mean.1 is missing"),
    ("resources.workers=many", "resources.workers='many': Input should be 'auto'"),
    (
        "mirror=s3://b/runs",
        "mirror='s3://b/runs': there is no such setting any more, expected null; out: s3://<bucket>/",
    ),
    ("resources.cache_bytes=-1", "resources.cache_bytes=-1: Input should be greater than or equal to 0"),
    ("resources.copies_bytes=-1", "resources.copies_bytes=-1: Input should be greater than or equal to 0"),
    ("resources.requests_in_flight=0", "resources.requests_in_flight=0: Input should be greater than or equal to 1"),
    ("evaluate.strengths=[4.5]", "evaluate.strengths.0=4.5: Input should be less than or equal to 4"),
    ("evaluate.strengths=[0.5, -0.1]", "evaluate.strengths.1=-0.1: Input should be greater than or equal to 0"),
    ("evaluate.strengths=[.nan]", "evaluate.strengths.0=nan: Input should be"),
    ("evaluate.strengths=0.5", "evaluate.strengths=0.5: Input should be a valid list"),
    ("evaluate.strengths=[0.5, 1]", "evaluate.strengths has 1, the model as trained, which has a row in any case"),
    ("evaluate.strengths=[0.5, 0.50]", "evaluate.strengths must be distinct, got [0.5, 0.5]"),
    ("evaluate.export=average@0.5", "evaluate.export='average@0.5': expected one of auto, backbone, average, transf"),
    ("seed=-1", "seed=-1: Input should be greater than or equal to 0"),
    ("epochs", "override 'epochs' must look like section.key=value"),
    ("=5", "override '=5' must look like section.key=value"),
    ("name.first=x", "override 'name.first=x': 'name' is not a section"),
    ("adapt.epochs=[", "override 'adapt.epochs=[': the value is not valid YAML"),
]


@pytest.mark.parametrize(("override", "words"), WRONG)
def test_what_is_wrong_is_said_in_one_line_with_key_and_value(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        config(tmp_path, SMALL, (override,))
    assert "\n" not in str(caught.value)
    assert "constrained" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^backbone is missing$"):
        config(tmp_path, {"name": "x", "data": {"train": "shards"}})


def test_a_row_to_compare_with_becomes_the_model_only_where_it_is_asked_for_or_alone(tmp_path: Path) -> None:
    variants = "fuse.variants=[average, neighbours, random-all, supervised]"
    assert config(tmp_path, SMALL, (variants,)).exported == "neighbours"
    assert config(tmp_path, SMALL, (variants, "evaluate.export=random-all")).exported == "random-all"
    assert config(tmp_path, SMALL, ("fuse.variants=[random-one, supervised]",)).exported == "supervised"
    assert config(tmp_path, SMALL, ("evaluate.export=null",)).evaluate.export == "auto"  # as files of before say
    for model in ("backbone", "k=64"):
        assert config(tmp_path, SMALL, (f"evaluate.export={model}",)).exported == model
    with pytest.raises(ValueError, match=r"evaluate.export='k=5': expected one of auto, backbone, k=4, k=8, average, "):
        config(tmp_path, SMALL, ("clustering.num_labels=[4, 8]", "evaluate.export=k=5"))
    assert config(tmp_path, SMALL, ("adapt.supervised=true", "evaluate.export=supervised-set")).evaluate.export


def test_fusions_that_are_no_baseline_and_need_no_gallery_have_a_row_for_each_strength(tmp_path: Path) -> None:
    variants = "fuse.variants=[neighbours, average, gallery, random-all, supervised]"
    found = config(tmp_path, SMALL, (variants, "evaluate.strengths=[0.5, 2, 0]", "evaluate.export=average@2"))
    rows = [f"{name}{at}" for name in ("neighbours", "average") for at in ("@0", "@0.5", "", "@2")]
    rest = ["gallery", "random-all", "supervised"]
    assert found.fused == [*rows, *rest]
    assert found.exported == "average@2"
    assert config(tmp_path, SMALL, (variants,)).fused == ["neighbours", "average", *rest]
    assert config(tmp_path, SMALL, (variants, "evaluate.strengths=[0.5]")).exported == "gallery"  # as without them


def test_a_run_without_strengths_has_the_settings_of_earlier_versions(tmp_path: Path) -> None:
    assert "strengths" not in config(tmp_path).yaml()
    some = config(tmp_path, SMALL, ("evaluate.strengths=[0.25, 0.5]",))
    path = tmp_path / "again.yaml"
    path.write_text(some.yaml())
    assert load(path) == some


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.25, 1 / 3, 1e-5, 0.1 + 0.2, 1.0])
@pytest.mark.parametrize("model", ["average", "neighbours-adam", "k=64", "odd@name"])
def test_a_name_has_its_model_and_its_strength(model: str, strength: float) -> None:
    assert split_strength(at_strength(model, strength)) == (model, strength)


def test_a_full_strength_is_not_in_the_name_and_a_whole_number_has_no_point() -> None:
    assert [at_strength("average", s) for s in (0, 0.0, 0.5, 1, 1.0)] == [
        *["average@0"] * 2,
        "average@0.5",
        *["average"] * 2,
    ]


@pytest.mark.parametrize("tree", [None, [1, 2], "text"])
def test_a_file_that_holds_no_sections_is_refused(tree: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"config\.yaml holds .*, expected sections of settings: name, data, backbone and others$"
    ):
        config(tmp_path, tree)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config .*nowhere\.yaml does not exist"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=r"config .* is a folder, expected a YAML file of settings"):
        load(tmp_path)
    for content in (b"name: [1", b"a: b: c", b"name: \xff\xfe\x00"):
        (tmp_path / "broken.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"config .*broken\.yaml is not valid YAML") as caught:
            load(tmp_path / "broken.yaml")
        assert "\n" not in str(caught.value)
        assert "byte string" not in str(caught.value)


def test_a_key_that_is_given_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    for twice in ("adapt: {epochs: 1}\nfuse: {epochs: 1}\nadapt: {gamma: 8.0}", "adapt: {epochs: 1, epochs: 2}"):
        (tmp_path / "twice.yaml").write_text(f"name: a\n{twice}\n")
        with pytest.raises(ValueError, match=r"twice\.yaml is not valid YAML: '(adapt|epochs)' is given twice .* line"):
            load(tmp_path / "twice.yaml")
    with pytest.raises(ValueError, match=r"override 'adapt=.*': the value is not valid YAML"):
        config(tmp_path, SMALL, ("adapt={epochs: 1, epochs: 2}",))
    again = "data: {train: [a]}\nbackbone: {name: 'timm:tiny'}\nname: b\nfuse: {<<: {epochs: 2}, epochs: 3}\n"
    (tmp_path / "merged.yaml").write_text(again)
    assert load(tmp_path / "merged.yaml").fuse.epochs == 3  # what is merged in gives way


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config(tmp_path).seed = 3


def test_settings_have_one_fingerprint_whatever_the_order_of_their_keys() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint(AdaptConfig(epochs=2, gamma=3)) == fingerprint(AdaptConfig(gamma=3.0, epochs=2))
    assert fingerprint({"k": (1, 2)}) == fingerprint({"k": [1, 2]})
    assert fingerprint("labels", {"k": 4}) == "68b6bad278"  # on any machine, in any version: names on disk depend on it


def test_other_settings_have_other_fingerprints() -> None:
    different = [
        fingerprint(*parts)
        for parts in (
            (AdaptConfig(),),
            (AdaptConfig(epochs=4),),
            (AdaptConfig(), 0),
            (DataConfig(train=("a",)),),
            (DataConfig(train=("b",)),),
            ({"a": 1},),
            ({"a": "1"},),
            ({"a": {"b": 1}},),
            (),
        )
    ]
    assert len(set(different)) == len(different)
    assert all(re.fullmatch("[0-9a-f]{10}", name) for name in different)


@pytest.mark.parametrize(
    "override", ["clustering.balance=0.9", "clustering.method=fast", "clustering.probes=0", "clustering.restarts=0"]
)
def test_impossible_clusterings_are_refused_by_name(tmp_path: Path, override: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: a\ndata: {train: x}\nbackbone: {name: 'timm:vit'}\n")
    with pytest.raises(ValueError, match=override.replace("fast", "'fast'")):
        load(path, [override])


def test_how_the_graph_is_searched_names_other_fusions_only_where_it_is_not_the_default() -> None:
    plain = FuseConfig()
    assert not {"graph", "recall_floor"} & set(plain.of_variant("neighbours"))
    assert plain.model_copy(update={"graph": "approximate"}).of_variant("neighbours")["recall_floor"] == 0.9
    other = plain.model_copy(update={"recall_floor": 0.5})
    assert other.of_variant("transforms") == plain.of_variant("transforms")
    exact = plain.model_copy(update={"graph": "exact"}), other.model_copy(update={"graph": "exact"})
    assert exact[0].of_variant("neighbours") == exact[1].of_variant("neighbours")  # it has no floor to reach
    assert exact[0].of_variant("neighbours") == plain.of_variant("neighbours")  # so the default is left out
    lists = other.model_copy(update={"graph": "approximate"}).of_variant("neighbours-adam")
    assert (lists["graph"], lists["recall_floor"]) == ("approximate", 0.5)


def test_every_variant_of_the_settings_has_one_description_and_another_name_is_refused() -> None:
    assert sorted(VARIANTS) == sorted(get_args(VariantName))
    assert len({(v.pairs, v.optimizer, v.start, v.labels, v.per_gallery) for v in VARIANTS.values()}) == len(VARIANTS)
    assert all(Variant.parse(name).name == name for name in VARIANTS)
    with pytest.raises(ValueError, match=r"'supervised-set' is not a variant of the fusion; there are average, "):
        Variant.parse("supervised-set")


def test_a_trained_variant_has_an_optimizer_and_learns_from_pairs_or_labels() -> None:
    for variant in VARIANTS.values():
        assert (variant.optimizer is not None) == (variant.pairs is not None or variant.labels)
        assert variant.num_random_sets(5) == {"random-one": 1, "random-all": 5}.get(variant.name, 0)
    assert [name for name, v in VARIANTS.items() if v.is_baseline] == ["random-one", "random-all", "supervised"]


MINIMAL = "name: a\ndata: {train: x}\nbackbone: {name: 'timm:vit'}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(MINIMAL, encoding="utf-8")
    return tmp_path / "config.yaml"


PATHS = {
    "out": lambda config: config.out,
    "data.train": lambda config: config.data.train[0],
    "data.test": lambda config: config.data.test[0],
    "backbone.checkpoint": lambda config: config.backbone.checkpoint,
    "resources.cache_dir": lambda config: config.resources.cache_dir,
    "resources.copies_dir": lambda config: config.resources.copies_dir,
}


@pytest.mark.parametrize("key", PATHS)
def test_home_folders_and_variables_are_expanded_in_every_path(
    key: str, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOT_SET", raising=False)
    for text, meant in (
        ("~/a b", "/home/me/a b"),
        ("'~'", "/home/me"),
        ("$SCRATCH/$SCRATCH", "/scratch/me//scratch/me"),
        ("'${SCRATCH}x/~'", "/scratch/mex/~"),
        ("./~/x", "./~/x"),
        ("a$$b/$5$", "a$b/$5$"),
    ):
        assert PATHS[key](load(minimal, [f"{key}={text}"])) == meant
    for text, why in (
        ("$NOT_SET/x", "the variable NOT_SET is not set"),
        ("~nobody-of-that-name/x", "there is no user 'nobody-of-that-name'; a folder of that name is ./~nobody"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(key)}.*={re.escape(repr(text))}: {re.escape(why)}"):
            load(minimal, [f"{key}={text}"])


def test_a_variable_may_hold_the_bucket_of_a_run(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://bucket")
    assert load(minimal, ["out=$BUCKET/x"]).out == "s3://bucket/x"


def test_settings_of_a_run_from_when_there_was_a_mirror_are_read(minimal: Path) -> None:
    before = load(minimal)
    minimal.write_text(minimal.read_text() + "\nmirror: null\n")
    assert load(minimal) == before
    minimal.write_text(minimal.read_text().replace("mirror: null", "mirror: s3://b/runs"))
    assert load(minimal, ["mirror=null"]) == before
    with pytest.raises(ValueError, match=r"^mirror='s3://b/runs': .*out: s3://<bucket>/<prefix>"):
        load(minimal)


def test_a_dollar_sign_in_a_path_survives_the_yaml_of_the_config(minimal: Path) -> None:
    config = load(minimal, ["out=/a$$b/$$$$", "data.test=[$$x, 5$]"])
    assert (config.out, config.data.test) == ("/a$b/$$", ("$x", "5$"))
    minimal.write_text(config.yaml(), encoding="utf-8")
    assert load(minimal) == config


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("a: &a [*a]", "an alias within what it names"),
        ("[" * 100_000, "more than 50 levels deep"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "more than 50 levels deep"),
        ("#" * 2**20 + "\nname: a", "longer than 1048576 bytes"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("name: 2024-13-45", "not valid YAML: month must be"),
        ("name: a\nname: b", "'name' is given twice"),
        ("seed: 1\ndata: {train: x, train: y}", "'train' is given twice"),
        ("name: \x00", "not valid YAML"),
        ("a: 1\n--- \nb: 2", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("1: 2\n" + MINIMAL, "1"),
        ("", "holds nothing, expected sections"),
    ],
)
def test_texts_that_grow_nest_or_repeat_are_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "config.yaml")


def test_a_config_that_never_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than"):
        load("/dev/zero")


def test_aliases_within_reason_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "name: a\ndata: {train: &x [x], test: *x}\nbackbone: {name: 'timm:vit'}\n", encoding="utf-8"
    )
    assert load(tmp_path / "config.yaml").data.test == ("x",)


@pytest.mark.parametrize(
    "override",
    [
        "data.train=[https://user:planted-secret@host/x.tar]",
        "data.train=['s3://AKIA:planted/secret@bucket']",
        "data.test='https://host/x.tar?X-Amz-Signature=planted-secret'",
        "out=s3://AKIA:planted-secret@bucket/x",
        "out=https://user:planted-secret@host",
        "mirror=s3://AKIA:planted-secret@bucket/x",
        "backbone.kwargs={url: 'https://user:planted-secret@host'}",
        "backbone.kwargs.api_token=planted-secret",
        "data.collection_kwargs={deep: [{password: planted-secret}]}",
        "notes=['made with planted-secret-of-environment']",
        "name=https://user:planted-secret@host",
        "nothing.here=https://user:planted-secret@host",
        "adapt.epochs=https://user:planted-secret@host",
    ],
)
def test_credentials_are_refused_by_key_and_not_repeated(
    override: str, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret-of-environment")
    with pytest.raises(ValueError, match="credential") as refusal:
        load(minimal, [override])
    assert "planted" not in str(refusal.value)
    assert str(refusal.value).startswith(override.partition("=")[0])


def test_settings_whose_names_only_sound_like_credentials_are_taken(minimal: Path) -> None:
    kwargs = "{class_token: true, num_tokens: 4, global_pool: token, key: null}"
    assert load(minimal, [f"backbone.kwargs={kwargs}"]).backbone.kwargs["global_pool"] == "token"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds nothing, expected sections of settings"),
        (b"# a comment\n", "holds nothing"),
        (b"- a\n- b\n", "holds a list"),
        (b"hello\n", "holds a text"),
        (b"3\n", "holds 3"),
        (b"name: x\ndata:\n\ttrain: a\n", "YAML is indented by spaces, not tabs"),
        (b"name: caf\xe9\n", "it is no text in UTF-8"),
        (bytes(range(128, 256)), "it is no text in UTF-8"),
        (
            b"name: x\ndata: [1, 2]\nbackbone: 3\n",
            "data=[1, 2]: expected settings below it; backbone=3: expected settings below it",
        ),
        (
            b"name:\ndata:\nbackbone:\n",
            "name=null: Input should be a valid string; data=null: expected settings below it",
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_plain_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(tmp_path / "c.yaml")
    assert not re.search(r"NoneType|DataConfig|\n", str(caught.value))


def test_ends_of_lines_and_marks_of_other_systems_are_read(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "demo.yaml").read_text()
    for name, data in {
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "utf16": text.encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert load(tmp_path / name) == load(ROOT / "configs" / "demo.yaml")
