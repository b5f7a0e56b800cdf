"""`make drill`: faults of every kind between baker, signer and enclave, under load, and what must hold after them.

plan       which fault meets which frame; pure, seeded
relay      plays the plan between signer and enclave
messages   the requests of the load
ledger     what was signed, and whether that was right; pure
client     one request over HTTP, with the Octez client's rule for 502
load       bakers who ask side by side, repeat, conflict and vanish
world      the processes: enclaves, signer, nitro-cli, relay
scenarios  the faults
runner     one scenario under load, and the checks after it
figures    restart, recovery and throughput, measured
table      the result, for a person
"""
