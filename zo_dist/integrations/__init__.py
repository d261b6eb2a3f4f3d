"""zo_dist inside other libraries. Each module imports its library when it is imported."""
