"""`python -m bench model`: it compares every goal with the model's prediction, and exits with 1 if one is missed."""

import pytest

pytest.importorskip("cupy")  # for simt.nvrtc
from bench import __main__ as program
from bench import model
from bench.model import BOTH, LOSS, Goal
from xent_array._engines import _model
from xent_array._engines._model import Code, Problem

LEAN = Code(32, 0, 4, 4, 0, 150, 16, [])
GOALS = list(model.goals())


def all_as(code):
    return lambda kernels: {kernel.name: code for kernel in kernels}


def test_the_goals_are_all_there():
    shares = {(goal.part.partition(" (")[0], goal.words, goal.job): goal.bound for goal in GOALS}
    assert len(shares) == len(GOALS) == 141
    assert shares["loss and gradient", "262144x1024:fp32", BOTH] == 0.96
    assert shares["loss and gradient", "4096x131072:bf16", BOTH] == 0.93
    assert shares["loss and gradient", "1024x262144:fp32", BOTH] == 0.90
    assert shares["loss alone", "262144x1024:fp32", LOSS] == 0.97
    assert shares["loss alone", "1048576x512:bf16", LOSS] == 0.93
    assert shares["classes apart, of all bytes", "64x2x1024x1024:bf16@axis1", BOTH] == 0.65
    assert shares["few classes, of all bytes", "25565281x21:bf16", LOSS] == 0.65
    assert shares["softcap", "16777x32000:bf16+softcap", BOTH] == 0.55
    for goal in GOALS:
        words = Problem.parse(goal.words)
        assert words._replace(axis=goal.problem.axis) == goal.problem


def test_a_goal_is_met_by_a_lean_kernel_and_missed_by_a_fat_one():
    goals = [goal for goal in GOALS if goal.part.startswith("loss and") and goal.problem.classes <= 8192]
    assert all(line.met for line in model.predicted(goals, all_as(LEAN)))
    fat = model.predicted(goals, all_as(LEAN._replace(instructions=20000)))
    assert not any(line.met for line in fat)
    assert {line.times.decides for line in fat} == {"instructions"}


def test_an_option_is_held_against_the_same_problem_without_it():
    (goal,) = (goal for goal in GOALS if goal.words == "262144x1024:fp32+smoothing" and goal.job == BOTH)
    (line,) = model.predicted([goal], all_as(LEAN))
    (plain,) = model.predicted([goal._replace(problem=goal.problem._replace(options=()), bound=0.5)], all_as(LEAN))
    assert line.bound == pytest.approx(plain.value - model.PLAIN_MINUS)
    plain_kernel = goal.problem._replace(options=()).plan(BOTH).kernel(BOTH).name

    def codes(kernels):
        return {k.name: LEAN if k.name == plain_kernel else LEAN._replace(instructions=20000) for k in kernels}

    assert not model.predicted([goal], codes)[0].met


def test_all_bytes_count_where_classes_are_few():
    few = Goal("", Problem((1 << 20, 2), "float32", 1), BOTH, 0.5, "bytes")
    (of_bytes, of_copy) = model.predicted([few, few._replace(of="copy")], all_as(LEAN))
    assert of_bytes.value == pytest.approx(of_copy.value * (2 * 8 + 8 + 4) / (2 * 8))


def test_a_mean_costs_what_its_launches_cost():
    assert model.launches("none") == 1
    assert 1 < model.launches("mean") <= 3
    (goal,) = (goal for goal in GOALS if goal.of == "mean")
    (line,) = model.predicted([goal], all_as(LEAN))
    took = line.times.all
    mean, none = (took + _model.STARTED * model.launches(reduction) for reduction in ("mean", "none"))
    assert line.value == pytest.approx(mean / none)


@pytest.mark.parametrize("met", [True, False])
def test_a_missed_goal_is_an_exit_code(met, monkeypatch, capsys):
    goal = Goal("part", Problem((1 << 16, 4096), "float32", 1), BOTH, 0.1 if met else 2.0)
    monkeypatch.setattr(model, "goals", lambda: [goal])
    monkeypatch.setattr(model, "codes", all_as(LEAN))
    assert program.main(["model"]) == 0
    assert program.main(["model", "--check"]) == (0 if met else 1)
    printed = capsys.readouterr().out
    assert f"{'yes' if met else 'NO '} " in printed
    assert "65536x4096:fp32 " in printed
    assert f"{int(met)} of 1 goals met" in printed


def test_what_was_counted_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model.kernel_resources, "counts_file", lambda: tmp_path / "absent.json")
    kernel = GOALS[0].problem.plan(BOTH).kernel(BOTH)
    compiled = []

    def resources(text, chip, file):
        compiled.append(text)
        counts = {"loops": [[1, 2, 3, 4]], "executed": [1, 1, []]}
        row = dict.fromkeys(model.nvrtc.NUMBERS, 1) | {"kernel": kernel.name, "chip": chip} | counts
        return [model.nvrtc.Resources(**row)]

    monkeypatch.setattr(model.nvrtc, "resources", resources)
    first, second = model.codes([kernel]), model.codes([kernel])
    assert first == second == {kernel.name: Code(1, 1, 1, 1, 1, 1, 1, [[1, 2, 3, 4]], [1, 1, []])}
    assert compiled == [kernel.text]


def test_counts_that_ship_are_taken_of_this_code_only(tmp_path, monkeypatch):
    kernel = GOALS[0].problem.plan(BOTH).kernel(BOTH)
    file = tmp_path / "counts.json"
    monkeypatch.setattr(model.kernel_resources, "counts_file", lambda: file)
    monkeypatch.setattr(_model, "counts", lambda: {kernel.name: LEAN})
    monkeypatch.setattr(model, "_kept", lambda kernel, chip: LEAN._replace(mufu=99))
    for digest, mufu in ((model.kernel_resources.digest(), LEAN.mufu), ("another", 99)):
        file.write_text(f'{{"digest": "{digest}", "chip": "sm_90"}}')
        assert model.codes([kernel])[kernel.name].mufu == mufu
