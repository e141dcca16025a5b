"""One thread of arithmetic for each process of the tests.

Tiny tensors gain nothing from a second one, and where other processes are busy each meeting of the
threads costs a tick of the scheduler. It must be said before torch is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
