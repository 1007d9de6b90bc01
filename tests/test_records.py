from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.records import a_record, make_record
from helpers.stores import put_store
from scipy.stats import ttest_rel

from mlpreduce.errors import ReductionError
from mlpreduce.records import Recorder, read, results, summarize, summary, tracking_uri
from mlpreduce.records.record import Hardware
from mlpreduce.train import Run
from mlpreduce.train.events import Ended, EpochEnded, Event, Started

# SQLAlchemy about mlflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")

PROFILE = {
    "params": 100,
    "mlp_params": 60,
    "unique_mlps": 4,
    "macs_linear": 1000,
    "macs": 1100,
    "macs_with_attention": 1200,
    "throughput": 50.0,
    "latency": 2.0,
    "peak_memory_mib": 3.0,
}
FACTS = {"plans": ['{"version": 1}'], "profile": PROFILE, "versions": {}, "hardware": {}, "train_samples": 8}


def epoch(number: int, top1: float) -> dict[str, float]:
    names = ("train_loss", "val_loss", "top5", "raw_val_loss", "raw_top1", "raw_top5", "lr", "images_per_s")
    return {"epoch": number, "top1": top1, **dict.fromkeys(names, 1.5)}


def make_runs(directory: Path, curves: dict[str, dict[int, list[float]]]) -> list[Run]:
    return [
        Run(
            recipe="toy",
            variant=variant,
            steps=() if variant == "baseline" else ({"transform": "grouped", "group": 2},),
            seed=seed,
            directory=str(directory / variant / f"seed{seed}"),
        )
        for variant, by_seed in curves.items()
        for seed in by_seed
    ]


def event(run: Run, what: Started | EpochEnded | Ended) -> Event:
    return Event(run.variant, run.seed, 3, what)


def record_all(directory: Path, curves: dict[str, dict[int, list[float]]]) -> Recorder:
    """Records of runs with the given top-1 per epoch, through the recorder and a real MLflow store."""
    runs = make_runs(directory, curves)
    recorder = Recorder(directory, {"name": "toy"}, runs)
    for run in runs:
        recorder.handle(event(run, Started(FACTS, [])))
        for number, top1 in enumerate(curves[run.variant][run.seed], 1):
            recorder.handle(event(run, EpochEnded(epoch(number, top1))))
        recorder.handle(event(run, Ended("finished")))
    return recorder


@pytest.fixture(autouse=True)
def _default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_store(tmp_path)
    put_store(tmp_path, "other.db")


def test_results_follow_the_schema(tmp_path: Path) -> None:
    curves = {
        "baseline": {1: [50.0, 80.0, 79.0], 2: [50.0, 78.0, 78.0]},
        "grouped": {1: [50.0, 81.0, 82.0], 2: [50.0, 79.0, 78.5]},
    }
    record_all(tmp_path, curves)
    document = results(tmp_path).as_json()
    assert list(document) == ["schema", "recipe", "warnings", "variants"]
    assert list(document["variants"]) == ["baseline", "grouped"]
    grouped = document["variants"]["grouped"]
    assert set(grouped) == {
        *("params", "mlp_params", "unique_mlps", "macs_linear", "macs", "macs_with_attention"),
        *("throughput", "peak_memory_mib", "runs"),
        *("top1_mean", "top1_std", "raw_top1_mean", "top5_mean", "peak_to_final_mean", "vs_baseline"),
    }
    assert {key: value for key, value in grouped["runs"][1].items() if key != "mlflow_run_id"} == {
        "seed": 2,
        "top1": 79.0,
        "top5": 1.5,
        "raw_top1": None,
        "peak_epoch": 2,
        "final_top1": 78.5,
        "peak_to_final": 0.5,
        "epochs": 3,
    }
    assert grouped["top1_mean"] == pytest.approx(80.5)
    assert grouped["top1_std"] == pytest.approx(2.12132, abs=1e-5)  # ddof=1; ddof=0 would be 1.5
    assert grouped["peak_to_final_mean"] == pytest.approx(0.25)
    assert document["variants"]["baseline"]["vs_baseline"] is None
    expected = ttest_rel([82.0, 79.0], [80.0, 78.0]).pvalue
    assert grouped["vs_baseline"] == {
        "delta": 1.5,
        "p_value": pytest.approx(expected),
        "n": 2,
        "test": "paired t",
        "df": 1,
        "ci_low": pytest.approx(1.5 - 12.706205 * 0.5, abs=1e-5),  # by hand: t(0.975, 1), and 0.7071 / sqrt(2)
        "ci_high": pytest.approx(1.5 + 12.706205 * 0.5, abs=1e-5),
    }


def test_interval_of_three_pairs_is_that_of_the_tables(tmp_path: Path) -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, df=2) = 4.302653."""
    record_all(tmp_path, {"baseline": {1: [50.0], 2: [60.0], 3: [70.0]}, "grouped": {1: [51.0], 2: [62.0], 3: [73.0]}})
    against = results(tmp_path).as_json()["variants"]["grouped"]["vs_baseline"]
    assert (against["n"], against["df"]) == (3, 2)
    assert against["ci_low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert against["ci_high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)


def test_one_seed_has_no_deviation_and_no_p(tmp_path: Path) -> None:
    record_all(tmp_path, {"baseline": {1: [50.0]}, "grouped": {1: [51.0], 2: [60.0]}})
    grouped = results(tmp_path).as_json()["variants"]["grouped"]
    undefined = dict.fromkeys(("p_value", "df", "ci_low", "ci_high"))
    assert grouped["vs_baseline"] == {"delta": 1.0, "n": 1, "test": "paired t", **undefined}
    assert results(tmp_path).as_json()["variants"]["baseline"]["top1_std"] is None


def test_equal_differences_have_no_p(tmp_path: Path) -> None:
    record_all(tmp_path, {"baseline": {1: [50.0], 2: [60.0]}, "grouped": {1: [51.0], 2: [61.0]}})
    against = results(tmp_path).as_json()["variants"]["grouped"]["vs_baseline"]
    assert (against["p_value"], against["ci_low"], against["ci_high"]) == (None, None, None)
    assert against["df"] == 1


def test_a_record_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "baseline" / "seed1" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, ')
    with pytest.raises(ReductionError, match=r"seed1/record.json: no JSON"):
        read(tmp_path)


def test_speed_of_other_hardware_is_not_averaged(tmp_path: Path) -> None:
    record_all(tmp_path, {"baseline": {1: [50.0], 2: [51.0]}})
    first, second = read(tmp_path)
    assert summarize([first, second]).variants["baseline"].throughput == 50.0
    second = second.model_copy(update={"hardware": Hardware(device="another")})
    assert summarize([first, second]).variants["baseline"].throughput is None


def test_best_epoch_is_the_first_of_equals() -> None:
    assert summary(a_record(top1=(70.0, 80.0, 80.0))).peak_epoch == 2


def test_a_finished_run_without_an_epoch_is_refused_by_name() -> None:
    with pytest.raises(ReductionError, match="record of grouped, seed 3, is finished and has no epoch"):
        summary(a_record("grouped", 3, ()))


def test_a_record_is_refused_by_the_key_that_it_lacks(tmp_path: Path) -> None:
    for lost in ("profile", "epochs", "recipe", "seed"):
        document = make_record("baseline", 1, [50.0], 0)
        del document[lost]
        (tmp_path / "baseline" / "seed1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "baseline" / "seed1" / "record.json").write_text(json.dumps(document))
        with pytest.raises(ReductionError, match=rf"record\.json: no record: {lost}: "):
            read(tmp_path)


def test_mlflow_mirrors_the_records(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    record_all(tmp_path, {"baseline": {1: [50.0, 60.0]}})
    (record,) = read(tmp_path)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    assert experiment.artifact_location.startswith(tmp_path.as_uri())
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == record.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.runName"] == "baseline-seed1"
    assert run.data.params["train.lr"] == "0.001"
    assert run.data.params["data.name"] == "folder"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "top1")] == [(1, 50.0), (2, 60.0)]
    assert run.data.metrics["final/top1"] == 60.0
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"plan0.json", "record.json"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []


def test_interrupted_run_goes_on_in_its_record_and_mlflow_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (run,) = make_runs(tmp_path, {"baseline": {1: []}})
    recorder = Recorder(tmp_path, {"name": "toy"}, [run])
    recorder.handle(event(run, Started(FACTS, [])))
    recorder.handle(event(run, EpochEnded(epoch(1, 50.0))))
    recorder.interrupt()
    (record,) = read(tmp_path)
    client = MlflowClient(tracking_uri=tracking_uri(tmp_path))
    assert record.status == "interrupted"
    assert client.get_run(record.mlflow_run_id).info.status == "KILLED"
    assert not recorder.finished(run)

    again = Recorder(tmp_path, {"name": "toy"}, [run])
    # The checkpoint is an epoch ahead of the record, as after a driver that was killed.
    again.handle(event(run, Started(FACTS, [epoch(1, 50.0), epoch(2, 55.0)])))
    again.handle(event(run, EpochEnded(epoch(3, 60.0))))
    again.handle(event(run, Ended("finished")))
    (resumed,) = read(tmp_path)
    assert resumed.mlflow_run_id == record.mlflow_run_id
    assert [entry.top1 for entry in resumed.epochs] == [50.0, 55.0, 60.0]
    history = client.get_metric_history(resumed.mlflow_run_id, "top1")
    assert [m.step for m in history] == [1, 2, 3]
    assert client.get_run(resumed.mlflow_run_id).info.status == "FINISHED"
    assert again.finished(run)


def test_another_tracking_store_gets_the_whole_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    (run,) = make_runs(tmp_path, {"baseline": {1: []}})
    recorder = Recorder(tmp_path, {"name": "toy"}, [run])
    recorder.handle(event(run, Started(FACTS, [])))
    recorder.handle(event(run, EpochEnded(epoch(1, 50.0))))
    recorder.interrupt()
    uri = f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # the store's own default for artifacts is relative
    again = Recorder(tmp_path, {"name": "toy"}, [run])
    again.handle(event(run, Started(FACTS, [epoch(1, 50.0)])))
    (record,) = read(tmp_path)
    assert record.mlflow_tracking_uri == uri
    assert len(MlflowClient(tracking_uri=uri).get_metric_history(record.mlflow_run_id, "top1")) == 1


def test_failed_run_keeps_its_epochs_and_leaves_the_results(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {"baseline": {1: [], 2: []}})
    recorder = Recorder(tmp_path, {"name": "toy"}, runs)
    for run, status in zip(runs, ("failed", "finished"), strict=True):
        recorder.handle(event(run, Started(FACTS, [])))
        recorder.handle(event(run, EpochEnded(epoch(1, 50.0))))
        recorder.handle(event(run, Ended(status, "the loss is nan")))
    first, _ = read(tmp_path)
    assert (first.status, first.message, len(first.epochs)) == ("failed", "the loss is nan", 1)
    assert [run["seed"] for run in results(tmp_path).as_json()["variants"]["baseline"]["runs"]] == [2]


def test_variants_that_start_from_different_weights_are_refused(tmp_path: Path) -> None:
    curves: dict[str, dict[int, list[float]]] = {"baseline": {1: [], 2: []}, "grouped": {1: [], 2: []}}
    runs = make_runs(tmp_path, curves)
    recorder = Recorder(tmp_path, {"name": "toy"}, runs)
    for run, digest in zip(runs, ("a", "b", "a", "c"), strict=True):  # a head may be drawn from the seed
        start = event(run, Started({**FACTS, "start_digest": digest}, []))
        if digest != "c":
            recorder.handle(start)
            continue
        with pytest.raises(
            ReductionError, match=r"no longer those that variant baseline began with \(digest b, now c\)"
        ):
            recorder.handle(start)
    assert [record.key for record in read(tmp_path)] == [
        ("baseline", 1),
        ("baseline", 2),
        ("grouped", 1),
    ]


@pytest.mark.parametrize("text", [b"{}", b"[1]", b"{", b"\xff", b'{"schema": 99}', b'{"schema": 1}'])
def test_what_is_no_record_is_told(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "baseline" / "seed1" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    with pytest.raises(
        ReductionError, match=r"baseline/seed1/record\.json: (no JSON|the record has schema|no record: recipe)"
    ):
        read(tmp_path)


def test_no_records_no_results(tmp_path: Path) -> None:
    with pytest.raises(ReductionError, match="no finished run"):
        results(tmp_path)
