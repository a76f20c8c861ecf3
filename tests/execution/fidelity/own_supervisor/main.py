import sys

import supervisor

print(supervisor.MINE, supervisor.__file__, [name for name in sys.modules if "supervisor" in name])
