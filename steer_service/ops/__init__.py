"""The maths: programs, the reference, the plan of a step, and one kernel file per device."""
