import multiprocessing


class Thing:
    def __init__(self, value):
        self.value = value


def work(thing, queue):
    queue.put((thing.value, __name__, multiprocessing.current_process().name))


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(Thing(5), queue))
    process.start()
    print(queue.get(), process.name)
    process.join()
    print(process.exitcode)
