import fidelity_helper

keep = fidelity_helper.Noisy("in main")
fidelity_helper.keep = fidelity_helper.Noisy("in helper")
