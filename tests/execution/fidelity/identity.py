import os

print(os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), os.getuid(), os.nice(0), os.sched_getaffinity(0))
print(os.getpriority(os.PRIO_PROCESS, 0))
