"""The rivals: fine-tuning, DMD2 distillation, and the two-stage pipelines, as other phases over the same loop."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from loop import assert_same_state, make, record

from unidad import checkpoint
from unidad.augment import CutMix
from unidad.cli import main
from unidad.heads import build_heads
from unidad.losses import denoising_loss
from unidad.methods.finetune import Finetune, denoise
from unidad.methods.objective import Objective
from unidad.methods.two_stage import AdaptThenDistill
from unidad.train import Stopped


def two_stage(seed: int = 7, student_from_teacher: bool = True, adapt_cycles: int = 2, transfer: float = 0.0) -> AdaptThenDistill:
    fake = tiny.backbone(2)
    return AdaptThenDistill(
        student=tiny.backbone(1),
        fake_teacher=fake,
        target_teacher=tiny.backbone(2),
        heads=build_heads("single", fake.feature_channels("stage"), 5),
        objective=Objective(fake_updates=2),
        student_steps=fake.schedule.student_steps(2),
        batch_size=2,
        generator=torch.Generator().manual_seed(seed),
        adapt_cycles=adapt_cycles,
        student_from_teacher=student_from_teacher,
        transfer=transfer,
        origin=tiny.backbone(6).state_dict(),
    )


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


@pytest.mark.parametrize("from_teacher", [True, False])
def test_the_second_stage_starts_from_the_adapted_weights(from_teacher, tmp_path, picture_folder):
    method = two_stage(student_from_teacher=from_teacher)
    first = {name: weights(network) for name, network in method.networks.items()}
    trainer = make(tmp_path, picture_folder, method, cycles=4, ema=0.9)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    original = method.start_cycle

    def start_cycle(cycle: int) -> tuple[str, ...]:
        replaced = original(cycle)
        seen[cycle] = {name: weights(network) for name, network in method.networks.items()}
        return replaced

    method.start_cycle = start_cycle
    trainer.fit()
    adapted = seen[2]["target_teacher"]
    assert not torch.equal(adapted, first["target_teacher"]), "stage 1 trains the teacher"
    assert torch.equal(seen[2]["fake_teacher"], adapted)
    assert torch.equal(seen[2]["student"], adapted if from_teacher else first["student"])
    assert torch.equal(weights(method.networks["target_teacher"]), adapted), "and stage 2 leaves it alone"
    assert not torch.equal(weights(method.networks["student"]), seen[2]["student"]), "while the student learns"
    assert trainer.place.updates == {"student": 2, "fake_teacher": 4, "heads": 4, "target_teacher": 2}


def test_a_distilled_student_takes_the_change_of_the_adapted_weights(tmp_path, picture_folder):
    method = two_stage(student_from_teacher=False, transfer=1.0)
    student, origin = tiny.backbone(1).state_dict(), tiny.backbone(6).state_dict()
    trainer = make(tmp_path, picture_folder, method, cycles=3)
    trainer.fit(until=2)
    assert method.start_cycle(2) == ("student", "fake_teacher")
    target = method.target_teacher.state_dict()
    for key, value in method.student.state_dict().items():
        torch.testing.assert_close(value, student[key] + target[key] - origin[key])


def test_averaging_starts_over_from_weights_that_were_handed_on(tmp_path, picture_folder):
    """With a decay of 1 the average would stay at the first student for ever; after the hand-over it is the adapted teacher."""
    method = two_stage()
    trainer = make(tmp_path, picture_folder, method, cycles=3, ema=0.999)
    trainer.fit()
    adapted = weights(method.networks["target_teacher"])
    assert trainer.ema.n_averaged == 1
    assert torch.equal(weights(trainer.product), weights(method.networks["student"])), "the first average is a copy"
    assert (weights(trainer.product) - adapted).abs().max() < 0.02


@pytest.mark.parametrize("stop_in_update", [1, 2, 3, 5])
def test_a_two_stage_run_resumes_to_the_same_bits(stop_in_update, tmp_path, picture_folder):
    whole = make(tmp_path / "whole", picture_folder, two_stage(), cycles=4, ema=0.9)
    expected = record(whole)
    whole.fit()
    parts = make(tmp_path / "parts", picture_folder, two_stage(), cycles=4, ema=0.9)
    seen = record(parts, stop_in_update)
    with pytest.raises(Stopped):
        parts.fit()
    again = make(tmp_path / "parts", picture_folder, two_stage(seed=99), cycles=4, ema=0.9)
    again.restore(checkpoint.latest(tmp_path / "parts" / "checkpoints")[1])
    after = record(again)
    again.fit()
    assert seen + after == expected
    assert [name for name, _ in expected][:3] == ["target_teacher", "target_teacher", "student"]
    assert_same_state(again, whole)


@pytest.mark.parametrize("change", [{"adapt_cycles": 0}, {"objective": Objective(dmd_weight=0.0)}])
def test_a_two_stage_method_without_one_of_its_stages_is_refused(change):
    fake = tiny.backbone(2)
    given = {"adapt_cycles": 2, "objective": Objective()} | change
    with pytest.raises(ValueError, match="adapt-then-distill needs"):
        AdaptThenDistill(
            student=tiny.backbone(1),
            fake_teacher=fake,
            target_teacher=tiny.backbone(2),
            heads=build_heads("single", fake.feature_channels("stage"), 5),
            student_steps=[999, 499],
            batch_size=2,
            generator=torch.Generator(),
            **given,
        )


def test_a_student_is_fine_tuned_at_its_own_timesteps_only():
    model, x = tiny.backbone(1), torch.rand(64, *tiny.SHAPE)
    asked: list[torch.Tensor] = []
    original = model.x0

    def x0(x_t, t, labels=None):
        asked.append(t)
        return original(x_t, t, labels)

    model.x0 = x0
    method = Finetune(model, torch.Generator().manual_seed(0), "v", student_steps=[998, 332])
    assert (method.product, list(method.networks)) == ("student", ["student"])
    method.loss(x)
    assert set(asked[0].tolist()) == {998, 332}
    assert 16 < (asked[0] == 998).sum() < 48, "both equally often"


def test_denoising_at_one_timestep_is_the_loss_by_hand():
    model, x = tiny.backbone(1), torch.rand(3, *tiny.SHAPE)
    loss = denoise(model, x, torch.Generator().manual_seed(0), "v", timesteps=[332])
    generator = torch.Generator().manual_seed(0)
    torch.randint(0, 1, (3,), generator=generator)
    eps, t = torch.randn(x.shape, generator=generator), torch.full((3,), 332)
    alpha, sigma = model.schedule.alpha_sigma(t)
    assert torch.equal(loss, denoising_loss(x, model.x0(alpha * x + sigma * eps, t), alpha, sigma, "v"))


@pytest.mark.parametrize(
    ("law", "below_a_quarter"), [("uniform", 0.25), ("quadratic", 0.5), ("detail", (2 * 0.625**0.5 + 0.5) / 3)]
)
def test_a_model_is_trained_at_all_timesteps_by_the_law_that_is_set(law, below_a_quarter):
    model, asked = tiny.backbone(1), []
    model.x0 = lambda x_t, t, labels=None: asked.append(t) or x_t
    Finetune(model, torch.Generator().manual_seed(0), "v", law=law).loss(torch.rand(4000, *tiny.SHAPE))
    assert abs(float((asked[0] < 250).float().mean()) - below_a_quarter) < 0.03
    assert int(asked[0].max()) > 990, "pure noise too"


def test_a_model_learns_from_composites_at_high_noise_only(monkeypatch):
    model, told, clean = tiny.backbone(1), [], []
    model.x0 = lambda x_t, t, labels=None: told.append(t) or x_t
    monkeypatch.setattr("unidad.methods.finetune.denoising_loss", lambda x, *_rest, **_more: clean.append(x) or x.sum())
    white = torch.full((1, *tiny.SHAPE), 255, dtype=torch.uint8)
    Finetune(model, torch.Generator().manual_seed(0), "v", mix=CutMix(white, 500.0)).loss(torch.full((300, *tiny.SHAPE), -1.0))
    pieced = (clean[0] == 1).flatten(1).any(dim=1)
    assert not pieced[told[0] < 500].any()
    assert abs(pieced[told[0] >= 500].float().mean() - 2 / 3) < 0.12


# -- from the command line --------------------------------------------------------------------------------------------

QUICK = [
    "--preset",
    "fsig-near",
    "--set",
    "features=stage",
    "--set",
    "cycles=2",
    "--set",
    "batch_size=2",
    "--set",
    "warmup=0",
    "--set",
    "tracker=none",
    "--set",
    "fake_updates=1",
]
JOBS = {
    "finetune": ["finetune", "--target"],
    "distill": ["distill", "--data"],
    "adapt-then-distill": ["train", "--method", "adapt-then-distill", "--set", "target_warmup=1", "--target"],
    "distill-then-adapt": ["train", "--method", "distill-then-adapt", "--target"],
}
INFO = {
    "finetune": "finetune, source ",
    "distill": "the source teacher alone, as `unidad distill`, K=3, k=1, source ",
    "adapt-then-distill": "adapt-then-distill, K=3, k=1, source ",
    "distill-then-adapt": "distill-then-adapt, K=3, source ",
}


@pytest.fixture(scope="module")
def rival(source, picture_folder, tmp_path_factory):
    """A function of a rival's name: its run folder, made once."""
    made = {}

    def make_run(name):
        if name not in made:
            start = ["--set", f"student_init={make_run('distill')}"] if name == "distill-then-adapt" else []
            out = tmp_path_factory.mktemp("runs") / name
            assert main([*JOBS[name], str(picture_folder), "--source", str(source), "--out", str(out), *QUICK, *start]) == 0
            made[name] = out
        return made[name]

    return make_run


@pytest.fixture(scope="module")
def distilled(rival):
    return rival("distill")


@pytest.mark.parametrize("name", JOBS)
def test_each_rival_leaves_a_product_a_grid_and_a_report(name, rival, tmp_path, capsys):
    out = rival(name)
    facts = json.loads((out / "run.json").read_text())
    product = "model" if name == "finetune" else "student"
    assert facts["product"] == product
    assert (out / product / "model_index.json").exists()
    assert (out / "grid.png").exists()
    assert ("fine-tuned many-step" in (out / "report.html").read_text()) == (name == "finetune")
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    assert INFO[name] in capsys.readouterr().out
    assert main(["sample", str(out), "-n", "2", "--out", str(tmp_path / "drawn"), "--steps", "2"]) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "exported")]) == 0


def test_distilling_uses_the_source_teacher_alone_and_a_single_head(distilled):
    settings = json.loads((distilled / "run.json").read_text())["settings"]
    assert (settings["a"], settings["heads"], settings["target_teacher"], settings["student_init"]) == (
        0.0,
        "single",
        "off",
        "source",
    )


def test_an_unfinished_fine_tuning_is_drawn_from_its_checkpoint(rival, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(rival("finetune"), out)
    (out / "model").rename(out / "elsewhere")
    assert main(["sample", str(out), "-n", "2", "--out", str(tmp_path / "drawn"), "--steps", "2"]) == 0
    assert main(["sample", str(out / "elsewhere"), "-n", "2", "--out", str(tmp_path / "finished"), "--steps", "2"]) == 0
    assert (tmp_path / "drawn" / "000001.png").read_bytes() == (tmp_path / "finished" / "000001.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--method", "distill-then-adapt", "--set", "student_init=source"], "starts from a distilled student"),
        (["train", "--method", "adapt-then-distill", "--set", "target_warmup=0"], "needs a first stage"),
        (["train", "--set", "method=finetun"], "Did you mean 'finetune'"),
    ],
)
def test_settings_that_a_rival_cannot_use(arguments, words, tmp_path, picture_folder, capsys):
    assert main([*arguments, "--target", str(picture_folder), "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["distill"], ["finetune"]])
def test_pictures_must_be_given(command, capsys):
    assert main(command) == 2
    assert ("--data" if command == ["distill"] else "--target") in capsys.readouterr().err


def test_a_rivals_card_says_how_it_was_made(distilled, rival, tmp_path):
    run = rival("distill-then-adapt")
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    for folder in (run / "student", tmp_path / "exported"):
        assert "fine-tuned at its own timesteps" in (folder / "README.md").read_text()
    assert "with the source teacher alone" in (distilled / "student" / "README.md").read_text()


def test_distilling_goes_on_with_what_the_run_was_told(source, picture_folder, tmp_path):
    """Also where that is not what the command asks for by itself."""
    words = ["distill", "--out", str(tmp_path / "run")]
    other = ["--set", "heads=multi", "--set", "cycles=1"]
    assert main([*words, "--data", str(picture_folder), "--source", str(source), *QUICK, *other]) == 0
    assert main([*words, "--resume", "--set", "cycles=2"]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["settings"]["heads"], facts["settings"]["cycles"]) == ("multi", 2)
    assert json.loads((tmp_path / "run" / "student" / "unidad.json").read_text())["cycle"] == 2


def test_distill_then_adapt_keeps_to_the_students_own_timesteps(distilled, source, picture_folder, tmp_path, capsys):
    words = ["train", "--source", str(source), "--target", str(picture_folder), "--out", str(tmp_path / "out"), *QUICK]
    rival = ["--method", "distill-then-adapt", "--set"]
    for more, said in (
        ([*rival, f"student_init={distilled}", "--steps", "2"], "Set timesteps=998,665,332."),
        ([*rival, f"student_init={source}"], "is a many-step model"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--set", f"student_init={distilled}", "--steps", "2"]) == 0
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["notes"]
    assert any("draws at the timesteps [998, 665, 332]; here it learns to draw at [999, 499]" in note for note in notes), notes
    assert str(distilled.parent) not in (tmp_path / "out" / "report.html").read_text(), "reports are shown around"


@pytest.mark.parametrize("more", [[], ["--preset", "avatars-demo"], ["--source", "elsewhere"]])
def test_adapt_then_distill_has_a_single_head_whatever_the_preset(more, capsys):
    """As DMD2 has, unless it is told otherwise."""
    words = ["train", "--method", "adapt-then-distill", "--list-settings", "--set", "target_warmup=1", *more]
    for told, heads in (([], "single"), (["--set", "heads=multi"], "multi")):
        assert main([*words, *told]) == 0
        assert f"heads: {heads}" in capsys.readouterr().out
