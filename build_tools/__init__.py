"""How this project is built: the build backend, and the build_ext command behind it."""
