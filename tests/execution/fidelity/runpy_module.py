import runpy

print(sorted(runpy.run_path("fidelity_data.txt")) if False else runpy.run_module("fidelity_helper")["GREETING"])
