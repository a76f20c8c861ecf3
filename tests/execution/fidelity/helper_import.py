import fidelity_helper

print(fidelity_helper.__name__, fidelity_helper.__file__, fidelity_helper.GREETING)
