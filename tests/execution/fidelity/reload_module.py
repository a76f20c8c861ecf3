import importlib

import fidelity_helper

del fidelity_helper.GREETING
print(importlib.reload(fidelity_helper).GREETING)
