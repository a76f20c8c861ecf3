class Late:
    def __del__(self):
        import there_is_no_such_module


late = Late()
