import fidelity_helper

fidelity_helper.deprecated()
