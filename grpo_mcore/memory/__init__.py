"""What a job will hold in memory, before it runs: pure functions of shapes, layouts and settings.
Imports no weights and needs no GPU."""
