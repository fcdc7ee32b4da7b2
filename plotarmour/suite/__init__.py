"""What notebooks and command lines call: the steps of the suite, grids through papermill, several GPUs."""
