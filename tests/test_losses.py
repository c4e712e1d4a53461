"""The terms of the loss by hand, where their gradients go, and runs that use them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from experiments.__main__ import main
from experiments.config.reading import build, load_config, recipes, to_yaml
from experiments.config.run_config import LossConfig, resolve
from experiments.errors import ConfigError
from experiments.evaluation.measuring import TokenUse, count_used, known_tokens, missed_target
from experiments.evaluation.precision import precision_context
from experiments.run_folder.folder import RunFolder
from experiments.training import objective, pretrained
from experiments.training.loop import Loop, Stopped, describe
from experiments.training.losses import distillation_loss, macs_loss
from experiments.training.trainer import Trainer
from experiments.trials import borderline
from models import Selection, create_model, tokens_per_block
from sparse_trainer.files.checkpoint import load_sparse, read_info, save_sparse
from sparse_trainer.flops import block_macs, count
from tests.conftest import TINY
from tests.test_training import CLOCKS, StopAt, configure, equal, make_trainer, open_data, read_metrics, run, start

THRESHOLD = {"kind": "threshold", "stages": [1], "thresholds": [1 / 197], "temperature": 1000.0}
"""At 17 tokens a patch of uniform attention scores 1 / 197, so about half of them are kept."""

JOINT: dict[str, dict[str, Any]] = {
    "model": {"kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 7, "num_heads": 3}},
    "sparsity": {"density": 0.4, "head_density": 0.67, "neuron_density": 0.5, "swap": "always", "start": "score"},
    "selector": {"keep_ratio": 0.5, "noise": 1.0},
    "training": {"ema_decay": 0.9},
}


def no_noise(*changes: dict[str, Any]) -> Trainer:
    return make_trainer({"sparsity": None}, *changes)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dense run of the small configuration."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "dense"
    run(start(folder, {"sparsity": None}))
    return folder


@pytest.fixture
def adaptive(dense_run: Path) -> dict[str, dict[str, Any] | None]:
    """Fine-tuning of the dense run with all three terms."""
    return {
        "model": {"start": str(dense_run)},
        "sparsity": None,
        "selector": THRESHOLD,
        "losses": {"macs_target": 0.8, "macs_weight": 1000.0, "teacher": str(dense_run)},
    }


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3; the other way 0.1308."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert distillation_loss(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert distillation_loss(teacher, student).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert distillation_loss(student + 3, student).item() == pytest.approx(0, abs=1e-6)
    # Logits twice as large at temperature 2 are the same distributions; the square of 2 goes before.
    assert distillation_loss(2 * student, 2 * teacher, 2.0).item() == pytest.approx(4 * 0.5 * math.log(4 / 3))
    both = distillation_loss(torch.cat([student, student]), torch.cat([teacher, student]))
    assert both.item() == pytest.approx(0.25 * math.log(4 / 3))


def tiny_adaptive(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("deit_tiny_patch16_224", selector={**THRESHOLD, **changes}, **TINY)


def test_macs_of_a_batch_by_hand() -> None:
    """17 tokens enter block 0; 9 and 5 enter block 1."""
    masks = torch.tensor([[1.0] * 8 + [0.0] * 8, [1.0] * 4 + [0.0] * 12])
    linear, attention = 4 * 24 * 24 + 2 * 24 * 96, 2 * 24
    fixed = 16 * 16 * 24 + 24 * 5

    def macs(*tokens: int) -> float:
        return fixed + sum(n * linear + n * n * attention for n in tokens)

    dense = macs(17, 17)
    mean = (macs(17, 9) + macs(17, 5)) / 2
    model = tiny_adaptive()
    selection = Selection((1,), (masks,), num_prefix_tokens=1)
    for target in (0.9, 0.5):
        found = macs_loss(selection, model, target, dense)
        assert found.item() == pytest.approx(abs(mean - target * dense) / 1e9, rel=1e-5)


@pytest.mark.parametrize(("target", "sign"), [(0.55, -1), (1.0, 1)])
def test_the_budget_moves_the_thresholds_the_right_way(
    target: float, sign: int, tiny_batch: tuple[Tensor, Tensor]
) -> None:
    """Too many MACs: the gradient is negative, so a step raises the threshold; too few: it lowers it."""
    model = tiny_adaptive().train()
    dense = count(model).macs
    _, selection = model(tiny_batch[0], return_selection=True)
    kept = selection.counts.float().mean().item()
    assert 1 < kept < 16
    macs_loss(selection, model, target, dense).backward()
    gradient = model.get_parameter("selector.thresholds").grad
    assert gradient is not None
    assert torch.sign(gradient).tolist() == [sign]


def test_thresholds_may_learn_more_slowly_than_the_rest() -> None:
    slow = {"selector": THRESHOLD, "optimizer": {"lr": 1e-2, "threshold_lr_scale": 0.01}}
    trainer = no_noise({**slow, "schedule": {"name": "constant", "warmup_epochs": 0}})
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train_step()
    moved = {name: (value - before[name]).abs().max().item() for name, value in trainer.model.named_parameters()}
    # The first step of AdamW is as long as the learning rate.
    assert moved["selector.thresholds"] == pytest.approx(1e-4, rel=0.01)
    assert moved["head.bias"] == pytest.approx(1e-2, rel=0.01)
    assert trainer.lr == pytest.approx(1e-2)
    owned = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(owned) == len({id(parameter) for parameter in owned}) == len(before)


def test_thresholds_do_not_scale_the_gradient_of_the_network(adaptive: dict[str, Any]) -> None:
    """Their slope is in the thousands; clipped together with it the network would hardly be heard."""
    trainer = no_noise(adaptive, {"training": {"clip_grad": 1.0}})
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    trainer.train_step()
    slope = seen.pop("selector.thresholds").norm()
    norm = torch.stack([gradient.norm() for gradient in seen.values()]).norm()
    assert slope > 10 * norm
    assert trainer.take_running()["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(
    ("computed", "kept", "said", "unsaid"),
    [
        (0.55, (40.0, 30.0), [], []),  # a few points come from the borders of training images
        (0.43, (40.0, 30.0), [], []),
        (0.6, (64.0, 30.0), ["60.0%", "above losses.macs_target (50.0%)", "block 1 drop nothing", "greater"], ["2"]),
        (0.9, (64.0, 64.0), ["block 1, 2 drop nothing"], []),
        (0.7, (50.0, 40.0), ["raise losses.macs_weight"], ["hardly learn"]),
        (0.3, (40.0, 1.0), ["30.0%", "below", "block 2 keep one patch", "smaller"], ["greater"]),
    ],
)
def test_a_target_that_was_missed_says_what_to_try(
    computed: float, kept: tuple[float, ...], said: list[str], unsaid: list[str]
) -> None:
    use = TokenUse(stages=(1, 2), patches=64, kept=kept, mean=(), mean_square=())
    found = missed_target(computed, 0.5, use)
    assert (found is None) == (not said)
    for word in said:
        assert word in (found or "")
    for word in unsaid:
        assert word not in (found or "")


def test_mean_macs_are_not_the_macs_of_the_mean(tiny_deit: Callable[..., nn.Module]) -> None:
    """Attention of 5 and 15 tokens costs (25 + 225) / 2, not 10 squared; the rest is linear."""
    model = tiny_deit()
    use = TokenUse(stages=(1,), patches=16, kept=(9.0,), mean=(17.0, 10.0), mean_square=(289.0, 125.0))
    found = count_used(model, {}, use, (1, 16, 16))
    blocks = block_macs(17, 24, 3, 8, 96) + (block_macs(5, 24, 3, 8, 96) + block_macs(15, 24, 3, 8, 96)) / 2
    assert found.macs == pytest.approx(blocks + 16 * 16 * 24 + 24 * 5)
    half = {"blocks.1.mlp.fc1.weight": torch.arange(96 * 24).view(96, 24) % 2 == 0}
    assert found.macs - count_used(model, half, use, (1, 16, 16)).live_macs == pytest.approx(10 * 96 * 24 / 2)


def test_the_macs_of_a_top_k_model_are_the_formula() -> None:
    """8 of 16 patches stay from the input on."""
    trainer = no_noise({"selector": {"keep_ratio": 0.5}})
    model = trainer.model
    before = trainer.count().live_macs  # known without an image
    metrics = trainer.evaluate().metrics
    expected = 16 * 49 * 24 + 24 * 10 + 16 * 24 + 2 * block_macs(9, 24, 3, 8, 96)
    assert metrics["tokens_kept/0"] == 8
    assert metrics["macs"] == pytest.approx(expected)
    assert before == trainer.count().live_macs == pytest.approx(expected)
    assert trainer.dense_macs == pytest.approx(count(model).macs - 16 * 24)  # without the scorer


def test_the_macs_of_training_fall_where_patches_do() -> None:
    """From all 16 patches to 8 over the first half of the run; evaluation keeps 8 from the start."""
    trainer = no_noise({"selector": {"keep_ratio": 0.5, "ramp": 0.5}})
    expected = {
        progress: 16 * 49 * 24 + 24 * 10 + 16 * 24 + 2 * block_macs(1 + kept, 24, 3, 8, 96)
        for progress, kept in ((0.0, 16), (0.25, 12), (0.5, 8), (1.0, 8))
    }
    for progress, macs in expected.items():
        trainer.model.set_progress(progress)
        assert trainer.training_macs() == {"train/macs": macs}
        assert trainer.count().live_macs == expected[1.0]
    assert no_noise({"selector": {"keep_ratio": 0.5}}).training_macs() == {}


@pytest.mark.parametrize(
    "selector",
    [
        {"keep_ratio": 0.7, "stages": [0, 1]},
        {"keep_ratio": 0.7, "stages": [0, 1], "dropped": "fused"},
        {"keep_ratio": 1.0, "dropped": "fused"},
        {"keep_ratio": 0.01},
        {"keep_ratio": 0.5, "gradient": "factor", "zeroing": True, "stages": [1]},
    ],
)
def test_what_top_k_keeps_is_known_before_it_is_measured(selector: dict[str, Any]) -> None:
    trainer = no_noise({"selector": selector})
    known = known_tokens(trainer.model)
    assert known is not None
    assert known == trainer.evaluate().tokens


# Of the compiler itself, where the noise of top-k splits what it compiles.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_and_compilation(amp: str, adaptive: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for changes in (adaptive, JOINT):
        plain = make_trainer(changes, {"training": {"amp": amp}})
        compiled = make_trainer(changes, {"training": {"amp": amp, "compile": True}})
        for _ in range(4):
            assert plain.train_step().counted
            compiled.train_step()
        assert plain.take_running() == pytest.approx(compiled.take_running())


def test_measured_tokens_are_those_of_single_images() -> None:
    trainer = no_noise({"selector": THRESHOLD}, {"data": {"eval_batch_size": 7}})
    measured = trainer.evaluate()
    assert measured.tokens is not None
    assert measured.kept is not None
    images = torch.cat([images for images, _ in trainer.data.eval.batches()])
    trainer.model.eval()
    with torch.no_grad():
        selections = [trainer.model(image[None], return_selection=True)[1] for image in images]
    tokens = torch.cat([tokens_per_block(selection, 2) for selection in selections])
    assert measured.kept.tolist() == [selection.counts[0].tolist() for selection in selections]
    assert measured.tokens.mean == pytest.approx(tokens.mean(dim=0).tolist())
    assert measured.tokens.mean_square == pytest.approx(tokens.square().mean(dim=0).tolist())
    assert len(set(measured.kept.flatten().tolist())) > 1


def test_terms_are_weighed_and_logged_apart(adaptive: dict[str, Any]) -> None:
    trainer = make_trainer(adaptive)
    for _ in range(3):
        trainer.train_step()
    means = trainer.take_running()
    weighed = means["train/loss_ce"] + 0.5 * means["train/loss_distillation"] + 1000 * means["train/loss_macs"]
    assert means["train/loss"] == pytest.approx(weighed, rel=1e-5)
    assert all(means[f"train/loss_{name}"] > 0 for name in ("ce", "distillation", "macs"))
    assert 1 <= means["tokens/kept/1"] <= 16
    assert trainer.take_running().keys() == {"train/loss", "train/grad_norm"}


def test_the_target_falls_over_the_first_part_of_the_run(
    adaptive: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From all tokens of the compact network; by the step number alone, so a resumed run goes on with it."""
    targets: list[float] = []

    def record(selection: Selection, model: nn.Module, target: float, *rest: Any) -> Tensor:
        targets.append(target)
        return macs_loss(selection, model, target, *rest)

    monkeypatch.setattr(objective, "macs_loss", record)
    trainer = make_trainer(adaptive, {"losses": {"macs_ramp": 0.5}})
    total = trainer.plan.total_steps
    for step in (0, total // 4, total // 2, total - 1):
        trainer.tried = step
        trainer.train_step()
    fall = (1 - 0.8) * (total // 4) / (0.5 * total)
    assert targets == pytest.approx([1.0, 1 - fall, 0.8, 0.8])


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
def test_the_teacher_has_its_own_precision(amp: str, adaptive: dict[str, Any], dense_run: Path) -> None:
    """And in 16 bits the loss is what it was, as near as makes no difference."""
    trainer = make_trainer(adaptive, {"losses": {"teacher_amp": amp}, "training": {"amp": "float32"}})
    assert trainer.teacher is not None
    images, targets = next(iter(trainer.data.train.batches(0)))[:2]
    terms, _ = trainer.objective.terms(trainer.model, images, targets)
    teacher = load_sparse(dense_run / "sparse.safetensors", create_model=create_model).eval()
    with torch.no_grad():
        exact = distillation_loss(trainer.model(images), teacher(images))
        with precision_context(torch.device("cpu"), amp)():
            assert torch.equal(trainer.teacher(images), teacher(images))
    assert terms["loss_distillation"].item() == pytest.approx(exact.item(), rel=0.02, abs=1e-4)
    trainer.objective.weigh(terms).backward()


@pytest.mark.parametrize(
    ("losses", "terms"),
    [
        ({}, {"ce", "distillation", "macs"}),
        ({"macs_weight": 0.0}, {"ce", "distillation"}),
        ({"distillation_weight": 0.0}, {"ce", "macs"}),
        ({"cross_entropy_weight": 0.0}, {"distillation", "macs"}),
        ({"macs_target": None, "teacher": None}, {"ce"}),
    ],
)
def test_each_term_can_be_switched_off(losses: dict[str, Any], terms: set[str], adaptive: dict[str, Any]) -> None:
    trainer = make_trainer(adaptive, {"losses": losses})
    trainer.train_step()
    assert {tag for tag in trainer.take_running() if "loss_" in tag} == {f"train/loss_{term}" for term in terms}
    assert (trainer.teacher is None) == ("distillation" not in terms)


def test_the_teacher_is_frozen_and_no_part_of_the_state(adaptive: dict[str, Any]) -> None:
    trainer = make_trainer(adaptive)
    assert trainer.teacher is not None
    before = {name: value.clone() for name, value in trainer.teacher.model.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    teacher = trainer.teacher.model
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert equal(before, dict(teacher.state_dict()))
    assert trainer.state_dict()["model"].keys() == trainer.model.state_dict().keys()
    names = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not names & {id(parameter) for parameter in teacher.parameters()}


def test_a_teacher_sees_its_own_normalisation(dense_run: Path) -> None:
    config = configure({"sparsity": None})
    data = open_data(config)
    images, _ = next(iter(data.eval.batches()))
    teacher = pretrained.create_teacher(str(dense_run), data, torch.device("cpu"))
    shifted = dataclasses.replace(data, mean=(0.1,), std=(0.7,))
    other = pretrained.create_teacher(str(dense_run), shifted, torch.device("cpu"))
    raw = images * data.std[0] + data.mean[0]
    torch.testing.assert_close(other((raw - 0.1) / 0.7), teacher(images))
    expected = load_sparse(dense_run / "sparse.safetensors", create_model=create_model)
    with torch.no_grad():
        assert torch.equal(teacher(images), expected(images))


def test_a_run_starts_with_the_weights_of_a_dense_one(dense_run: Path) -> None:
    dense = load_sparse(dense_run / "sparse.safetensors", create_model=create_model)
    for where in (dense_run, dense_run / "sparse.safetensors"):
        trainer = no_noise({"model": {"start": str(where)}, "selector": THRESHOLD})
        for name, parameter in dense.named_parameters():
            assert torch.equal(trainer.model.get_parameter(name), parameter)
        assert trainer.model.get_parameter("selector.thresholds").tolist() == pytest.approx([1 / 197])
    sparse = make_trainer({"model": {"start": str(dense_run)}})
    for name, mask in sparse.masks.items():
        assert torch.equal(sparse.model.get_parameter(name), dense.get_parameter(name) * mask)


def test_the_best_units_of_a_trained_network_start(dense_run: Path, tmp_path: Path) -> None:
    """Odd neurons write nothing, so the better half are the even ones."""
    trained = no_noise({"model": {"start": str(dense_run)}})
    with torch.no_grad():
        for block in range(2):
            trained.model.get_parameter(f"blocks.{block}.mlp.fc2.weight")[:, 1::2] = 0
    path = tmp_path / "even.safetensors"
    save_sparse(path, trained.model, masks={}, info=describe(trained, {}), create_model=create_model)
    units = {"density": None, "neuron_density": 0.5, "updates": 0, "start": "score"}
    for changes in ({}, {"data": {"mixup": 0.8}}, {"selector": THRESHOLD, "losses": {"teacher": str(dense_run)}}):
        trainer = make_trainer({"model": {"start": str(path)}, "sparsity": units}, changes)
        assert trainer.sparsity is not None
        assert trainer.sparsity.live_neurons == {f"blocks.{block}": tuple(range(0, 96, 2)) for block in range(2)}


@pytest.mark.parametrize("kind", ["joint", "adaptive"])
@pytest.mark.parametrize("at", [7, 10], ids=["inside an epoch", "between epochs"])
def test_a_resumed_run_equals_one_that_never_stopped(
    kind: str, at: int, tmp_path: Path, adaptive: dict[str, Any], dense_run: Path
) -> None:
    changes = adaptive if kind == "adaptive" else JOINT
    whole = start(tmp_path / "whole", changes)
    run(whole)
    with pytest.raises(Stopped):
        run(start(tmp_path / "parts", changes), StopAt, at=at)
    config = configure(changes)
    resumed = Loop(Trainer(config, open_data(config), resuming=True), RunFolder(tmp_path / "parts"))
    torch.rand(3)
    resumed.resume()
    run(resumed)
    assert equal(whole.trainer.state_dict(), resumed.trainer.state_dict())
    assert whole.history == resumed.history
    assert whole.folder.sparse.read_bytes() == resumed.folder.sparse.read_bytes()
    records = [
        [{tag: value for tag, value in record.items() if tag not in CLOCKS} for record in read_metrics(loop.folder)]
        for loop in (whole, resumed)
    ]
    assert records[0] == records[1]


def test_what_a_joint_run_leaves(tmp_path: Path) -> None:
    """Weights, heads, neurons and tokens under one count of MACs."""
    loop = start(tmp_path / "run", JOINT)
    taus = []
    step = loop.trainer.train_step
    tau = loop.trainer.model.selector.tau
    loop.trainer.train_step = lambda stop: (step(stop), taus.append(float(tau)))[0]  # type: ignore
    run(loop)
    assert taus == pytest.approx([10 - 9.9 * done / 20 for done in range(20)])
    records = {record["step"]: record for record in read_metrics(loop.folder)}
    info = read_info(loop.folder.sparse)
    # Two of three heads, 48 of 96 neurons and 9 of 17 tokens, if all weights were live.
    full = 2 * block_macs(9, 24, 2, 8, 48) + 16 * 49 * 24 + 24 * 10 + 16 * 24
    assert 0.3 * full < info.macs < 0.9 * full
    assert records[20]["eval/macs"] == pytest.approx(info.macs, abs=1)
    assert records[20]["budget/macs"] == records[20]["eval/macs"]
    assert info.metrics["tokens_kept/0"] == 8
    assert records[3]["tokens/kept/0"] == 8
    loaded = load_sparse(loop.folder.sparse, create_model=create_model).eval()
    images, _ = next(iter(loop.trainer.data.eval.batches()))
    with torch.no_grad():
        assert torch.equal(loaded(images), loop.trainer.result_model.eval()(images))


def test_what_an_adaptive_run_leaves(tmp_path: Path, adaptive: dict[str, Any]) -> None:
    loop = start(tmp_path / "run", adaptive)
    run(loop)
    records = {record["step"]: record for record in read_metrics(loop.folder)}
    tags = {"train/loss_ce", "train/loss_macs", "train/loss_distillation", "tokens/kept/1", "tokens/threshold/1"}
    assert records[3].keys() >= tags
    assert records[20]["tokens/threshold/1"] == pytest.approx(
        loop.trainer.model.get_parameter("selector.thresholds").item()
    )
    assert records[20]["tokens/threshold/1"] != pytest.approx(1 / 197, rel=1e-4)
    events = EventAccumulator(str(loop.folder.tensorboard), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Images("tokens/overlay")] == [10, 20]
    assert [event.step for event in events.Histograms("tokens/kept_per_image/1")] == [10, 20]
    assert events.Histograms("tokens/kept_per_image/1")[0].histogram_value.num == 20
    info = read_info(loop.folder.sparse)
    assert info.metrics["macs"] == pytest.approx(info.macs, abs=1)


def test_the_gradient_of_thresholds_under_the_bound(
    tmp_path: Path, adaptive: dict[str, Any], dense_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial, on a run that has just been made."""
    loop = start(tmp_path / "run", adaptive)
    run(loop)
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    json_file = tmp_path / "figures.json"
    assert borderline.main([str(loop.folder.path), "--batches", "2", "--json", str(json_file)]) == 0
    computed, difference, greatest = json.loads(json_file.read_text())["figures"]
    assert 0 < computed["value"] <= computed["reference"]
    assert 0 <= difference["value"] <= greatest["value"] * (1 + 1e-6) < 0.05
    assert "difference of the thresholds' gradient" in capsys.readouterr().out

    loop = start(tmp_path / "dense", {"sparsity": None})
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    assert borderline.main([str(loop.folder.path)]) == 2
    assert "was not trained with thresholds alone" in capsys.readouterr().err


@pytest.mark.parametrize("stopped_at", [None, 9])
def test_pictures_of_patches_become_rare(tmp_path: Path, adaptive: dict[str, Any], stopped_at: int | None) -> None:
    """At evaluations 1, 2, 4, 8 and the last, whether the run was stopped or not."""
    changes = adaptive | {"training": {"eval_every": 0.2}}
    loop = start(tmp_path / "run", changes)
    if stopped_at is not None:
        with pytest.raises(Stopped):
            run(loop, StopAt, at=stopped_at)
        config = configure(changes)
        loop = Loop(Trainer(config, open_data(config), resuming=True), RunFolder(tmp_path / "run"))
        loop.resume()
    run(loop)
    assert [record["step"] for record in read_metrics(loop.folder) if "eval/top1" in record] == list(range(2, 21, 2))
    events = EventAccumulator(str(loop.folder.tensorboard), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Images("tokens/overlay")] == [2, 4, 8, 16, 20]
    assert [event.step for event in events.Histograms("tokens/kept_per_image/1")] == [2, 4, 8, 16, 20]


def test_the_command_line_measures_tokens(
    tmp_path: Path, adaptive: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """From YAML to the tables, and evaluation finds the MACs that the training found."""
    file = tmp_path / "adaptive.yaml"
    file.write_text(to_yaml(configure(adaptive, {"training": {"epochs": 1}})))
    folder = tmp_path / "run"
    assert main(["train", "--config", str(file), f"--output.runs={tmp_path}", "--output.name=run"]) == 0
    out = capsys.readouterr().out
    assert "teacher   " in out
    assert "start     " in out
    assert "│ patches kept" in out
    assert "of 16 (" in out
    info = read_info(folder / "sparse.safetensors")
    assert main(["evaluate", str(folder / "sparse.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs"] == info.macs
    assert found["tokens_kept/1"] == info.metrics["tokens_kept/1"]


def test_a_run_goes_on_without_what_it_started_from(tmp_path: Path, dense_run: Path) -> None:
    copy = tmp_path / "start.safetensors"
    copy.write_bytes((dense_run / "sparse.safetensors").read_bytes())
    changes: dict[str, Any] = {"model": {"start": str(copy)}, "sparsity": None}
    loop = start(tmp_path / "run", changes)
    loop.folder.config.write_text(to_yaml(loop.trainer.config))
    with pytest.raises(Stopped):
        run(loop, StopAt, at=3)
    copy.unlink()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert json.loads(loop.folder.metrics.read_text().splitlines()[-1])["step"] == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"macs_target": 0.0}, "macs_target: 0.0 is not a share in (0, 1] or null"),
        ({"macs_target": 65.0}, "macs_target: 65.0 is not a share in (0, 1] or null"),
        ({"macs_target": math.nan}, "macs_target: nan is not a share in (0, 1] or null"),
        ({"macs_weight": -1.0, "temperature": 0.0}, "macs_weight: -1.0 is not 0 or more; temperature: 0.0 is not a "),
        ({"distillation_weight": math.inf}, "distillation_weight: inf is not 0 or more"),
        ({"cross_entropy_weight": 0.0}, "cross_entropy_weight: 0 leaves nothing to learn from; give a teacher"),
    ],
)
def test_losses_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LossConfig(**values)
    assert str(error.value).startswith(message)
    with pytest.raises(ConfigError) as named:
        build({"losses": values})
    assert str(named.value).startswith("losses.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"losses": {"macs_target": 0.65}},
            "losses.macs_target: 0.65 needs tokens that can be dropped, but selector is null; set selector.kind to "
            "threshold",
        ),
        (
            {"losses": {"macs_target": 0.65}, "selector": {"keep_ratio": 0.5}},
            "losses.macs_target: 0.65 cannot be learned with selector.kind top_k, whose MACs selector.keep_ratio (0.5) "
            "fixes; set selector.kind to threshold, or macs_target to null",
        ),
        (
            {"losses": {"macs_target": 0.3}, "selector": THRESHOLD, "sparsity": None},
            "losses.macs_target: 0.3 of the dense MACs cannot be reached; with selector.stages [1] and the heads and "
            "neurons that are live it is between 0.5",
        ),
        (
            {"losses": {"teacher": "deit_small_patch16_224"}},
            "losses.teacher: deit_small_patch16_224 knows 1000 classes and the data has 10, takes 3 channels and "
            "data.in_chans is 1, takes 224 x 224 pixels and data.image_size is 28; choose a teacher of this data",
        ),
        ({"losses": {"teacher": "deit_smal"}}, "losses.teacher: there is no file or folder deit_smal, and as "),
        ({"losses": {"teacher": "runs/gone"}}, "losses.teacher: there is no runs/gone; give the folder of a finished"),
        ({"losses": {"teacher": "deit_quickstart"}}, "losses.teacher: there is no file or folder deit_quickstart"),
        ({"losses": {"teacher": "vit_tiny_patch16_224.augreg_in21"}}, "losses.teacher: there is no file or folder vit"),
        ({"model": {"start": "runs/gone"}}, "model.start: there is no runs/gone; give the folder of a finished run"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer(change)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_pretrained_and_start_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^model.pretrained and start: give one of them, not both$"):
        build({"model": {"pretrained": True, "start": "runs/x"}})


def test_networks_that_cannot_teach_or_start(dense_run: Path, tmp_path: Path) -> None:
    config = configure({"sparsity": None})
    data = open_data(config)

    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            pretrained.create_teacher(str(dense_run), dataclasses.replace(data, **changes), torch.device("cpu"))
        return str(error.value)

    names = data.class_names
    where = f"losses.teacher: {dense_run}"
    assert refused(class_names=names[:4]) == (
        f"{where} knows 10 classes and the data has 4; choose a teacher of this data"
    )
    assert refused(image_size=32).startswith(f"{where} takes 28 x 28 pixels and data.image_size is 32")
    assert refused(in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3).startswith(
        f"{where} takes 1 channels and data.in_chans is 3"
    )
    assert refused(class_names=names[::-1]).startswith(f"{where} knows other classes ({names[0]}, ")

    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_text("hello")
    sparse = start(tmp_path / "sparse", {"training": {"epochs": 1}})
    run(sparse)
    for start_from, message in (
        (tmp_path / "empty", "holds no sparse.safetensors; give the folder of a finished run"),
        (tmp_path / "file.safetensors", "is truncated or no safetensors file"),
        (tmp_path / "sparse", "is a sparse network (7,620 of 15,240 (50.00%)"),
    ):
        with pytest.raises(ConfigError) as error:
            no_noise({"model": {"start": str(start_from)}})
        assert str(error.value).startswith("model.start: ")
        assert message in str(error.value)
    with pytest.raises(
        ConfigError, match=r"pos_embed is \[1, 17, 24\] there and \[1, 50, 24\] here, and 1 more; it was made as"
    ):
        no_noise({"model": {"start": str(dense_run), "kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 4}}})
    with pytest.raises(ConfigError, match=r"blocks\.2\..* is missing there and"):
        no_noise({"model": {"start": str(dense_run), "kwargs": {"embed_dim": 24, "depth": 3, "patch_size": 7}}})
    with pytest.raises(ConfigError, match=r"knows other classes"):
        pretrained.load_start(
            no_noise().model, str(dense_run), dataclasses.replace(data, class_names=data.class_names[::-1])
        )


@pytest.mark.parametrize(("name", "target"), [("as_vit_deit_small_65", 0.65), ("as_vit_deit_small_50", 0.5)])
def test_the_recipes_of_the_paper(name: str, target: float) -> None:
    config = resolve(load_config(recipes()[name]))
    assert config.sparsity is None
    assert config.selector is not None
    assert (config.selector.stages, config.selector.thresholds) == ((4, 7, 10), (0.001, 0.002, 0.003))
    losses = config.losses
    assert (losses.macs_target, losses.macs_weight, losses.distillation_weight, losses.temperature) == (
        target,
        2,
        0.5,
        1,
    )
    assert config.model.pretrained
    assert losses.teacher == config.model.name == "deit_small_patch16_224.fb_in1k"
    assert config.optimizer.lr == pytest.approx(2e-5)
    assert (config.training.epochs, config.schedule.warmup_epochs, config.schedule.min_lr) == (30, 0, 2e-6)
    plus, plain = (resolve(load_config(recipes()[f"svite_{kind}deit_small"])) for kind in ("plus_", ""))
    assert plus.selector is not None
    assert plus.selector.keep_ratio == 0.95
    assert dataclasses.replace(plus, selector=None, recipe="") == dataclasses.replace(plain, recipe="")
