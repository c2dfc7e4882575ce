"""Measure attention here: standard attention, which writes its scores, beside a kernel that never does."""

from ridgeline.study.attention import bench, report
from ridgeline.study.attention.cases import Choice

choice = Choice(
    batches=(1,), sequences=(128, 512), heads=4, head_dims=(64,), causal=False, dtype="float32", device="cpu"
)
for experiment in ("sweep", "memory"):
    result = bench.run(experiment, choice, bench.Settings(rounds=3), ["standard", "fused"], ["none"])
    for cell in result["cells"]:
        for name, one in cell["results"].items():
            if "seconds" in one:
                print(f"{cell['case']['label']:28} {name:9} {report.seconds(one['seconds'][0]):>8}")
            else:
                print(f"{cell['case']['label']:28} {name:9} {report.size(one['peak_bytes']):>8} beyond its inputs")
    for line in report.claims(result):
        print(line)
