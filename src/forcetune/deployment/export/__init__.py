"""Files of a run for programs that simulate, one module a target.

A module of this folder that has a :class:`~forcetune.deployment.export.target.Target` named ``TARGET`` is a target;
there is no other list.
"""
