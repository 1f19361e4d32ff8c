"""TensorRT, all generations: building plans, reading what a plan really runs, and running it on a GPU.

Each function takes the vendor's module as a value (`tensorrt` or `tensorrt_rtx`) and selects by what that module has,
never by its version string. Nothing here imports a stage or a backend, and importing it imports no engine.
"""
