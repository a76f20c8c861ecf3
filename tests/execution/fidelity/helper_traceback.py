import fidelity_helper

fidelity_helper.fail()
