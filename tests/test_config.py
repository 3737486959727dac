"""ClipConfig: every framework's name for the threshold, files of the frameworks, and what is said
about a mistake.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusedclip import AutoClip, ClipConfig, Clipper, ZClip, clip_
from fusedclip.clipper import NONFINITE
from fusedclip.policies import POLICIES
from tests import forked

FRAMEWORK_NAMES = ["max_grad_norm", "gradient_clip_val", "gradient_clipping", "clip_grad"]
SECTIONS = ["train_args", "training_args", "trainer", "deepspeed_config", "deepspeed"]


def read(text: str, **options: Any) -> ClipConfig:
    return ClipConfig.from_dict(yaml.safe_load(text), **options)


def model_and_optimizer(lr: float = 1.0) -> tuple[nn.Linear, torch.optim.SGD]:
    model = nn.Linear(4, 1, bias=False)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


class TestThreshold:
    @pytest.mark.parametrize("name", ["max_norm", *FRAMEWORK_NAMES])
    @pytest.mark.parametrize("section", [None, *SECTIONS, "fusedclip"])
    def test_every_name_in_every_section(self, name: str, section: str | None) -> None:
        settings = {name: 0.5} if section is None else {section: {name: 0.5}}
        assert ClipConfig.from_dict(settings) == ClipConfig(max_norm=0.5)

    @pytest.mark.parametrize("name", FRAMEWORK_NAMES)
    @pytest.mark.parametrize("value", [0, 0.0, None, "0", "0.0"])
    def test_a_frameworks_zero_or_null_is_no_clipping(self, name: str, value: Any) -> None:
        assert ClipConfig.from_dict({name: value}).max_norm == math.inf

    @pytest.mark.parametrize("value", [0, 0.0, "0", None])
    def test_the_own_name_refuses_zero_and_says_why(self, value: Any) -> None:
        for make in (ClipConfig, ClipConfig.from_kwargs):
            with pytest.raises(ValueError, match=r"max_norm: expected a number > 0 .* write inf"):
                make(max_norm=value)

    def test_yaml_reads_1e_3_as_a_string(self) -> None:
        assert yaml.safe_load("max_grad_norm: 1e-3") == {"max_grad_norm": "1e-3"}  # why it matters
        assert read("max_grad_norm: 1e-3").max_norm == 1e-3
        assert read("max_norm: 5e-1").max_norm == 0.5
        assert read("max_norm: .inf").max_norm == read("max_norm: inf").max_norm == math.inf

    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            (-1.0, "expected a number >= 0, got -1.0"),
            (math.nan, "expected a number >= 0, got nan"),
            (True, "expected a number, got True"),
            ("much", "expected a number, got 'much'"),
            ([1.0], r"expected a number, got \[1.0\]"),
        ],
    )
    def test_bad_values_are_named_with_their_place(self, value: Any, complaint: str) -> None:
        for settings, place in (
            ({"max_grad_norm": value}, "max_grad_norm"),
            ({"train_args": {"gradient_clip_val": value}}, "train_args.gradient_clip_val"),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^{place}: {complaint}"):
                ClipConfig.from_dict(settings)

    def test_auto_is_transformers_business(self) -> None:
        with pytest.raises(ValueError, match=r"^gradient_clipping: 'auto' is filled in by"):
            read("gradient_clipping: auto")
        together = "max_grad_norm: 0.3\ndeepspeed: {gradient_clipping: auto}"
        assert read(together).max_norm == 0.3

    def test_null_beside_a_value_is_unset(self) -> None:
        assert read("gradient_clip_val: null\nmax_grad_norm: 1.0").max_norm == 1.0

    def test_no_threshold(self) -> None:
        with pytest.raises(ValueError, match=r"^no threshold: expected one of max_norm, max_grad_"):
            ClipConfig.from_dict({})
        with pytest.raises(ValueError, match="is 'max_grad_nrom' meant to be one of them"):
            ClipConfig.from_dict({"max_grad_nrom": 1.0, "lr": 1}, ignore_unknown=True)


class TestConflicts:
    def test_different_values_name_both_places(self) -> None:
        text = "max_grad_norm: 1.0\ntrain_args: {gradient_clipping: 0.5}"
        complaint = (
            "max_grad_norm and train_args.gradient_clipping are the same setting with different "
            "values, 1.0 and 0.5; keep one of them"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
            read(text)

    def test_no_clipping_conflicts_with_clipping(self) -> None:
        with pytest.raises(ValueError, match=r"inf and 1\.0"):
            read("clip_grad: 0\nmax_grad_norm: 1.0")

    def test_equal_values_are_fine(self) -> None:
        text = "max_norm: 1\nmax_grad_norm: 1.0\ntrain_args: {clip_grad: '1e0'}"
        assert read(text) == ClipConfig(max_norm=1.0)

    def test_other_settings_too(self) -> None:
        with pytest.raises(ValueError, match=r"^scope and fusedclip\.scope are the same setting"):
            read("max_norm: 1\nscope: global\nfusedclip: {scope: group}")

    @given(
        st.lists(
            st.tuples(st.sampled_from(FRAMEWORK_NAMES), st.sampled_from([None, 0, 0.5, 1.0, "1"])),
            min_size=1,
            unique_by=lambda pair: pair[0],
        )
    )
    def test_any_set_of_names(self, pairs: list[tuple[str, Any]]) -> None:
        said = {float(value) or math.inf for _, value in pairs if value is not None}
        if len(said) > 1:
            with pytest.raises(ValueError, match="same setting with different values"):
                ClipConfig.from_dict(dict(pairs))
        else:
            assert ClipConfig.from_dict(dict(pairs)).max_norm == (said.pop() if said else math.inf)


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("typo", "meant"),
        [
            ("max_grad_nrom", "max_grad_norm"),
            ("gradient_cliping", "gradient_clipping"),
            ("non_finite", "nonfinite"),
            ("train_arg", "train_args"),
        ],
    )
    def test_a_suggestion(self, typo: str, meant: str) -> None:
        complaint = f"^{typo}: unknown setting; did you mean '{meant}'\\?"
        with pytest.raises(ValueError, match=complaint):
            ClipConfig.from_dict({"max_norm": 1.0, typo: {}})

    def test_nothing_close(self) -> None:
        with pytest.raises(ValueError, match=r"^trainer\.output: unknown setting; known are max_n"):
            ClipConfig.from_dict({"trainer": {"output": 1, "max_norm": 1.0}})

    def test_how_to_read_a_frameworks_file_is_said(self) -> None:
        with pytest.raises(ValueError, match="ignore_unknown=True"):
            ClipConfig.from_dict({"train_batch_size": 8, "gradient_clipping": 1.0})

    def test_a_section_must_be_one(self) -> None:
        for key in ("train_args", "fusedclip"):
            with pytest.raises(TypeError, match=f"^{key}: expected a section with settings, got 3"):
                ClipConfig.from_dict({key: 3, "max_norm": 1.0})

    def test_keys_that_are_not_strings(self) -> None:
        with pytest.raises(ValueError, match=r"^7: unknown setting"):
            ClipConfig.from_dict({7: 1, "max_norm": 1.0})  # type: ignore[dict-item]


class TestFrameworksOwnFiles:
    """As the frameworks write them, most keys being about other things."""

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            pytest.param(
                {
                    "train_batch_size": 8,
                    "gradient_accumulation_steps": 1,
                    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                    "bf16": {"enabled": True},
                    "zero_optimization": {"stage": 2},
                    "gradient_clipping": 1.0,
                },
                1.0,
                id="DeepSpeed",
            ),
            pytest.param(
                {
                    "output_dir": "out",
                    "max_grad_norm": 0.3,
                    "deepspeed": None,
                    "fsdp": "",
                    "ddp_backend": "nccl",
                    "learning_rate": 2e-4,
                },
                0.3,
                id="Transformers",
            ),
            pytest.param(
                {
                    "seed_everything": 1,
                    "trainer": {
                        "max_epochs": 3,
                        "gradient_clip_val": 0.5,
                        "gradient_clip_algorithm": None,
                        "callbacks": [{"init_args": {"monitor": "val_loss"}}],
                    },
                    "model": {"class_path": "m.Model"},
                },
                0.5,
                id="LightningCLI",
            ),
            pytest.param(
                {
                    "distributed_type": "DEEPSPEED",
                    "deepspeed_config": {"zero_stage": 3, "gradient_clipping": 2.0},
                },
                2.0,
                id="accelerate",
            ),
            pytest.param(
                {"model": "resnet50", "clip_grad": None, "clip_mode": "agc", "opt": "sgd"},
                math.inf,
                id="timm without clipping",
            ),
            pytest.param(
                {"clip_grad": 1.0, "clip_mode": "norm", "scope": 3, "backend": "nccl"},
                1.0,
                id="other meanings of our names",
            ),
        ],
    )
    def test_they_are_read(self, settings: dict[str, Any], expected: float) -> None:
        assert ClipConfig.from_dict(settings, ignore_unknown=True) == ClipConfig(max_norm=expected)
        with pytest.raises((TypeError, ValueError)):
            ClipConfig.from_dict(settings)

    def test_our_other_settings_have_a_section(self) -> None:
        text = "max_grad_norm: 1.0\nnonfinite: zero\nfusedclip: {nonfinite: skip, norm_type: inf}"
        config = read(text, ignore_unknown=True)
        assert config == ClipConfig(max_norm=1.0, nonfinite="skip", norm_type=math.inf)

    def test_and_that_section_is_strict(self) -> None:
        with pytest.raises(ValueError, match=r"^fusedclip\.scop: unknown .* mean 'scope'"):
            read("max_grad_norm: 1.0\nfusedclip: {scop: group}", ignore_unknown=True)

    @pytest.mark.parametrize("key", ["gradient_clip_algorithm", "clip_mode"])
    def test_another_algorithm_is_refused(self, key: str) -> None:
        for name, function in (("value", "clip_grad_value_"), ("agc", "agc_")):
            with pytest.raises(
                ValueError, match=f"^{key}: '{name}' is not .*fusedclip.{function} "
            ):
                ClipConfig.from_dict({"clip_grad": 1.0, key: name})
        with pytest.raises(ValueError, match=f"^{key}: expected 'norm', 'value' or 'agc', got 3"):
            ClipConfig.from_dict({"clip_grad": 1.0, key: 3})
        assert ClipConfig.from_dict({"clip_grad": 1.0, key: "norm"}) == ClipConfig(max_norm=1.0)


class TestPolicies:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("zclip", {"zclip": {"alpha": 0.97, "z": 2.5, "warmup": 25, "eps": 1e-6}}),
            ("{zclip: }", {"zclip": {"alpha": 0.97, "z": 2.5, "warmup": 25, "eps": 1e-6}}),
            (
                "{zclip: {z: 3, eps: 1e-5}}",
                {"zclip": {"alpha": 0.97, "z": 3.0, "warmup": 25, "eps": 1e-5}},
            ),
            (
                "{autoclip: {percentile: 90}}",
                {"autoclip": {"percentile": 90.0, "window": 10_000, "warmup": 0}},
            ),
        ],
    )
    def test_sections(self, text: str, expected: dict[str, Any]) -> None:
        config = read(f"max_norm: {text}")
        assert config.to_dict()["max_norm"] == expected
        assert isinstance(config.max_norm, (AutoClip, ZClip))

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (
                "zclp",
                rf"policies {re.escape(str(tuple(POLICIES)))}, got 'zclp'; did you mean 'zclip'",
            ),
            ("{zclip: {}, autoclip: {}}", "a number or one policy such as"),
            ("{}", "a number or one policy such as"),
            ("{zclip: 3}", r"max_norm\.zclip: expected its arguments as a mapping, got 3"),
            (
                "{zclip: {zz: 3}}",
                r"max_norm\.zclip: unknown argument 'zz'; known: alpha, z, warmup",
            ),
            ("{zclip: {warmups: 3}}", r"unknown argument 'warmups'; did you mean 'warmup'"),
            ("{zclip: {z: -1}}", r"max_norm\.zclip\.z: expected a number >= 0, got -1"),
            ("{zclip: {z: 0}}", r"max_norm\.zclip\.z: expected a number in \(0, inf\), got 0.0"),
            ("{autoclip: {window: 2.5}}", r"max_norm\.autoclip\.window: expected an integer >= 1"),
        ],
    )
    def test_mistakes(self, text: str, complaint: str) -> None:
        with pytest.raises((TypeError, ValueError), match=complaint):
            read(f"max_norm: {text}")

    def test_frameworks_have_none(self) -> None:
        with pytest.raises(ValueError, match=r"^max_grad_norm: expected a number, got 'zclip'"):
            read("max_grad_norm: zclip")

    def test_each_clipper_has_its_own_history(self) -> None:
        config = ClipConfig(max_norm=ZClip(warmup=2))
        first, second = config.build(*model_and_optimizer()), config.build(*model_and_optimizer())
        assert isinstance(first.max_norm, ZClip) and isinstance(second.max_norm, ZClip)
        first.max_norm.threshold(torch.tensor(3.0))
        seen = [clipper.max_norm.state_dict()["seen"].item() for clipper in (first, second)]
        assert seen == [1, 0]
        assert config.max_norm.state_dict()["seen"] == 0  # type: ignore[union-attr]
        assert second.max_norm.warmup == 2


class TestOtherFields:
    @pytest.mark.parametrize(
        ("field", "value", "complaint"),
        [
            ("norm_type", "two", "norm_type: expected a number or 'inf', got 'two'"),
            ("norm_type", math.nan, "norm_type: expected a number or 'inf', got NaN"),
            ("nonfinite", "skipp", r"nonfinite: expected one of \(.*\), got 'skipp'; .* 'skip'"),
            ("nonfinite", ["zero"], r"nonfinite: expected one of \(.*\), got \['zero'\]"),
            ("scope", "layer", r"scope: expected one of \('global', 'group', 'parameter'\)"),
            ("monitor", "yes", "monitor: expected true or false, got 'yes'"),
            ("monitor", 1, "monitor: expected true or false, got 1"),
            ("monitor_window", 0, "monitor_window: expected an integer >= 1, got 0"),
            ("monitor_window", True, "monitor_window: expected an integer >= 1, got True"),
            ("backend", "cdua", "backend: expected one of .*, got 'cdua'; did you mean 'cuda'"),
        ],
    )
    def test_mistakes(self, field: str, value: Any, complaint: str) -> None:
        with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
            ClipConfig(max_norm=1.0, **{field: value})
        with pytest.raises((TypeError, ValueError), match=f"^train_args.{complaint}"):
            ClipConfig.from_dict({"train_args": {"max_norm": 1.0, field: value}})

    @pytest.mark.parametrize("scope", ["global", "group", "parameter"])
    @pytest.mark.parametrize("name", ["autoclip", "zclip", "adagc", "skipspikes"])
    def test_every_policy_at_every_scope(self, scope: str, name: str) -> None:
        settings = {"max_norm": name, "scope": scope, "monitor": True}
        config = ClipConfig.from_dict({"fusedclip": settings})
        assert ClipConfig.from_dict(config.to_dict()) == config
        model, optimizer = model_and_optimizer()
        clipper = config.build(model, optimizer, allow_sync=True)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert clipper.monitor is not None and clipper.monitor.summary().steps == 1
        assert type(clipper.max_norm).__name__.lower() == name
        assert clipper.max_norm is not config.max_norm  # a memory of its own

    @pytest.mark.parametrize(
        "value", [3.0, "1e2", {"skipspikes": {"window": 16}}, "skipspikes", None]
    )
    def test_skip_above(self, value: Any) -> None:
        config = ClipConfig.from_dict({"max_norm": 1.0, "skip_above": value})
        assert ClipConfig.from_dict(config.to_dict()) == config
        model, optimizer = model_and_optimizer()
        clipper = config.build(model, optimizer, allow_sync=True)
        assert (clipper.skip_above is None) == (value is None)
        if value is not None:
            with pytest.raises(ValueError, match="cannot leave out a step"):
                config.build(*model_and_optimizer())

    def test_a_policy_that_clips_leaves_out_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"^skip_above: .*\('skipspikes',\), got ZClip"):
            ClipConfig(max_norm=1.0, skip_above=ZClip())

    def test_a_backend_of_another_machine_is_fine(self) -> None:
        """A configuration may be read where it cannot run; building refuses it."""
        config = ClipConfig(max_norm=1.0, backend="triton")
        with pytest.raises(RuntimeError, match="triton"):
            config.build(*model_and_optimizer())

    def test_fields_are_keywords_and_frozen(self) -> None:
        with pytest.raises(TypeError):
            ClipConfig(1.0)  # type: ignore[misc]
        with pytest.raises(dataclasses.FrozenInstanceError):
            ClipConfig(max_norm=1.0).max_norm = 2.0  # type: ignore[misc]

    def test_keywords_with_a_frameworks_name(self) -> None:
        assert ClipConfig.from_kwargs(max_grad_norm=0.5) == ClipConfig(max_norm=0.5)


positive = st.floats(min_value=1e-300, allow_nan=False)
policies = st.one_of(
    st.builds(AutoClip, percentile=st.floats(0.5, 100), window=st.integers(50, 90)),
    st.builds(ZClip, alpha=st.floats(0.1, 0.9), z=st.floats(0.1, 9), warmup=st.integers(1, 50)),
)


@given(
    st.builds(
        ClipConfig,
        max_norm=st.one_of(positive, policies),
        norm_type=st.sampled_from([1.0, 2.0, 2.5, math.inf]),
        nonfinite=st.sampled_from(NONFINITE),
        monitor=st.booleans(),
        monitor_window=st.integers(1, 1000),
        backend=st.sampled_from(["auto", "reference", "cuda"]),
    )
)
def test_round_trips(config: ClipConfig) -> None:
    settings = config.to_dict()
    again = (
        ClipConfig.from_dict(settings),
        ClipConfig.from_dict(json.loads(json.dumps(settings))),
        ClipConfig.from_dict(yaml.safe_load(yaml.safe_dump(settings))),
    )
    for copy in again:
        assert copy == config and hash(copy) == hash(config)
    changed = dataclasses.replace(config, monitor_window=config.monitor_window + 1)
    assert changed != config  # the comparison can fail


class TestFiles:
    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".YAML"])
    def test_by_suffix(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"run{suffix}"
        path.write_text('{"train_args": {"max_grad_norm": 0.5}}')  # JSON is YAML
        assert ClipConfig.from_file(path) == ClipConfig.from_file(str(path))
        assert ClipConfig.from_file(path).max_norm == 0.5

    @pytest.mark.parametrize(
        ("name", "text", "complaint"),
        [
            ("run.yaml", "max_grad_nrom: 1", "max_grad_nrom: unknown .* mean 'max_grad_norm'"),
            ("run.yaml", "max_norm: [", "not valid YAML: "),
            ("run.yaml", "!!python/object:os.system {}", "not valid YAML: "),
            ("run.yaml", "", "expected a mapping of settings at the top, got NoneType"),
            ("run.json", "[1]", "expected a mapping of settings at the top, got list"),
            ("run.json", "{max_norm: 1}", "not valid JSON: "),
            ("run.yaml", "max_norm: 1\nmax_norm: 2", "max_norm stands twice in the same place"),
            ("run.json", '{"scope": "group", "scope": "global"}', "scope stands twice"),
            ("run.yaml", "train_args:\n  clip_grad: 1\n  clip_grad: 1", "clip_grad stands twice"),
            ("run.toml", "max_norm = 1", r"expected a file named \.yaml, \.yml or \.json"),
        ],
    )
    def test_mistakes_begin_with_the_path(
        self, name: str, text: str, complaint: str, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(str(path))}: {complaint}"):
            ClipConfig.from_file(path)

    def test_a_frameworks_file(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text('{"train_batch_size": 8, "gradient_clipping": 0.7}')
        assert ClipConfig.from_file(path, ignore_unknown=True).max_norm == 0.7

    def test_what_is_repeated_elsewhere_is_not_ours(self, tmp_path: Path) -> None:
        for name, text in (
            ("run.yaml", "lr: 1\nlr: 2\na: {max_norm: 3}\nmax_norm: 0.7"),
            ("run.json", '{"lr": 1, "lr": 2, "max_norm": 0.7}'),
        ):
            (tmp_path / name).write_text(text)
            config = ClipConfig.from_file(tmp_path / name, ignore_unknown=True)
            assert config == ClipConfig(max_norm=0.7)

    def test_merge_keys_of_yaml(self, tmp_path: Path) -> None:
        """A default that is overridden stands once in each place."""
        path = tmp_path / "run.yaml"
        path.write_text("x: &x {max_norm: 1}\ntrain_args: {<<: *x, max_norm: 2}\n")
        assert ClipConfig.from_file(path, ignore_unknown=True).max_norm == 2.0

    def test_without_pyyaml(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "yaml", None)
        (tmp_path / "a.json").write_text('{"max_norm": 2}')
        assert ClipConfig.from_file(tmp_path / "a.json").max_norm == 2.0
        (tmp_path / "a.yaml").write_text("max_norm: 2")
        with pytest.raises(ModuleNotFoundError, match=r"PyYAML: pip install 'fusedclip\[config\]'"):
            ClipConfig.from_file(tmp_path / "a.yaml")

    def test_importing_it_needs_no_pyyaml(self) -> None:
        script = "import sys; sys.modules['yaml'] = None; import fusedclip; fusedclip.ClipConfig"
        forked.python("-c", script, check=True)


class TestBuild:
    def step(self, clipper: Clipper, model: nn.Linear, optimizer: torch.optim.SGD) -> torch.Tensor:
        """The update of a step whose gradient is (3, 0, 4, 0), of norm 5."""
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
        optimizer.step()
        assert clipper.last_norm is not None and clipper.last_norm.item() == 5.0
        return before - model.weight.detach()

    def test_it_is_attached(self) -> None:
        model, optimizer = model_and_optimizer()
        clipper = ClipConfig.from_kwargs(max_grad_norm=1.0).build(model, optimizer)
        update = self.step(clipper, model, optimizer)
        torch.testing.assert_close(update, torch.tensor([[0.6, 0.0, 0.8, 0.0]]))

    def test_zero_in_a_framework_measures_only(self) -> None:
        model, optimizer = model_and_optimizer()
        clipper = ClipConfig.from_kwargs(clip_grad=0).build(model, optimizer)
        update = self.step(clipper, model, optimizer)
        torch.testing.assert_close(update, torch.tensor([[3.0, 0.0, 4.0, 0.0]]))

    def test_every_setting_arrives(self) -> None:
        config = ClipConfig(
            max_norm=2.0, norm_type=math.inf, nonfinite="zero", backend="reference", monitor=True,
            monitor_window=7,
        )  # fmt: skip
        clipper = config.build(*model_and_optimizer())
        assert (clipper.max_norm, clipper.norm_type, clipper.nonfinite) == (2.0, math.inf, "zero")
        assert (clipper.backend, clipper.scope) == ("reference", "global")
        assert clipper.monitor is not None
        assert (clipper.monitor.window, clipper.monitor.max_norm) == (7, 2.0)
        assert ClipConfig(max_norm=2.0).build(*model_and_optimizer()).monitor is None

    def test_a_monitor_beside_a_policy(self) -> None:
        model, optimizer = model_and_optimizer()
        clipper = ClipConfig(max_norm=AutoClip(), monitor=True).build(model, optimizer)
        self.step(clipper, model, optimizer)
        assert clipper.monitor is not None
        assert clipper.monitor.summary().max_norm == 5.0  # the first norm is its own threshold

    def test_groups_are_those_of_the_optimizer(self) -> None:
        model = nn.Linear(2, 2)
        groups = [{"params": [model.weight], "max_norm": 0.5}, {"params": [model.bias]}]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        clipper = ClipConfig(max_norm=1.0, scope="group").build(model, optimizer)
        assert clipper.parameters is optimizer
        model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2) * 3
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        updates = [
            (b - p.detach()).norm().item() for b, p in zip(before, model.parameters(), strict=True)
        ]
        assert updates == pytest.approx([0.5, 1.0], rel=1e-5)

    def test_skipping_needs_a_wait(self) -> None:
        config = ClipConfig(max_norm=1.0, nonfinite="skip")
        model, optimizer = model_and_optimizer()
        with pytest.raises(ValueError, match="allow_sync=True"):
            config.build(model, optimizer)
        config.build(model, optimizer, allow_sync=True)
        model.weight.grad = torch.full((1, 4), math.nan)
        before = model.weight.detach().clone()
        optimizer.step()
        assert torch.equal(model.weight.detach(), before)

    def test_it_clips_like_clip_(self) -> None:
        model, optimizer = model_and_optimizer()
        clipper = ClipConfig(max_norm=1.5).build(model, optimizer)
        update = self.step(clipper, model, optimizer)
        p = nn.Parameter(torch.zeros(1, 4))
        p.grad = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
        clip_([p], 1.5)
        torch.testing.assert_close(update, p.grad)


class TestPage:
    """docs/choosing-a-threshold.md shows what is read."""

    text = (Path(__file__).parent.parent / "docs" / "choosing-a-threshold.md").read_text()

    def test_its_file(self) -> None:
        [sample] = re.findall(r"```yaml\n(.*?)```", self.text, re.DOTALL)
        assert read(sample) == ClipConfig(max_norm=1.0, nonfinite="zero", monitor=True)

    def test_its_names(self) -> None:
        section = self.text.split("## One setting, many names")[1]
        for name in ("max_norm", *FRAMEWORK_NAMES, *SECTIONS):
            assert f"`{name}`" in section or f"{name}:" in section, name
