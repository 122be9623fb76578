"""`python -m bench scale`: that it measures what it says, on little."""

import json
import re

import pytest

for needed in ("matplotlib", "tqdm", "distributed"):
    pytest.importorskip(needed)

from bench import report, scale, suite  # noqa: E402

LITTLE = ["--rows", "64", "--cluster-gib", "0.0625", "--file-gib", "0.0625", "--limit-gib", "1"]


@pytest.mark.full
def test_every_job_on_little(tmp_path, capsys):
    out = tmp_path / "scale.jsonl"
    assert scale.main([*LITTLE, "--folder", str(tmp_path), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(report.by_key(rows)) == len(rows)
    by_job = {
        job: [row for row in rows if row["case"].startswith(job)] for job in ("threads", "cluster", "memmap", "dask")
    }
    assert {row["library"] for row in by_job["threads"]} == {scale.DASK, scale.DIRECT}
    assert all(row["seconds"] > 0 for rows in by_job.values() for row in rows)
    (cluster,) = by_job["cluster"]
    assert len(cluster["peaks"]) == 2
    assert cluster["loss"] == pytest.approx(10.9, abs=0.1)
    for (row,) in (by_job["memmap"], by_job["dask"]):
        assert row["own"] <= row["limit"]
        assert row["loss"] == pytest.approx(10.9, abs=0.1)
    for row in rows:
        if row["case"].startswith("traffic"):
            numbers = 4 * (8 if "float64" in row["case"] else 4)
            assert numbers <= row["bytes per row"] <= numbers + 0.1
            assert row["exchanges"] == 1
    assert list(tmp_path.iterdir()) == [out]
    said = capsys.readouterr().out
    assert said.count("| --- |") == 2
    assert all(row["case"] in said for row in rows)


def test_a_job_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        scale.main(["disk"])
    assert re.search("JOB must be of threads, cluster, memmap, dask-memmap, traffic; got disk", capsys.readouterr().err)


def test_the_report_compares_with_the_same_on_numpy_arrays():
    common = {"case": "threads 64", "operation": suite.GRAD, "backend": suite.SCALE, "gib": 1.0}
    rows = [{**common, "library": scale.DIRECT, "seconds": 0.5}, {**common, "library": scale.DASK, "seconds": 0.6}]
    (table,) = report.scale(report.by_key(rows))
    assert "| 600.0 | 1.20× |" in table
    assert "| 500.0 |  |" in table
