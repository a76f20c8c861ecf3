import fidelity_helper

fidelity_helper.open_and_write("left-open.txt")
