class Interrupt(KeyboardInterrupt):
    pass


raise Interrupt("mine")
