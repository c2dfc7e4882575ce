"""Measure attention here: standard attention, which writes its scores, beside a kernel that never does."""

from ridgeline.study.attention import bench, report
from ridgeline.study.attention.cases import Choice

shape = {"batches": (1,), "sequences": (128, 512, 1024), "heads": 4, "head_dims": (64,), "dtype": "float32"}
choice = Choice(**shape, causal=False, device="cpu")
result = bench.run("sweep", choice, bench.Settings(rounds=3), ["standard", "fused"], ["none"])
for cell in result["cells"]:
    for name, one in cell["results"].items():
        time, gain = report.seconds(one["seconds"][0]), one.get("over_standard", [1.0])[0]
        print(f"{cell['case']['label']:24} {name:9} {time:>8} {gain:5.2f}x standard's speed")
