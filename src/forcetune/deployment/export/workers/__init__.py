"""Scripts that call a library's converter and compute probes with what it wrote.

They are run by the interpreter that has the library, which need not have forcetune, and import nothing of forcetune.
Each takes the file of its task, JSON, and reads and writes arrays as :mod:`forcetune.deployment.export.conversion`
describes.
"""
