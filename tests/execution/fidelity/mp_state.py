import multiprocessing
from multiprocessing import process

current = multiprocessing.current_process()
print(current.name, current.daemon, multiprocessing.parent_process(), process.ORIGINAL_DIR, len(current.authkey))
print(multiprocessing.active_children(), next(process._process_counter), multiprocessing.get_start_method())
