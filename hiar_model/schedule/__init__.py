"""The grid of steps and blocks as data: tasks, orders, costs, the simulator. Plain Python, no torch."""
