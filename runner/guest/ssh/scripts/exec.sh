# The host set dir, the arguments and the function environment; the program's input is on
# the standard input.
place
cd -- "$dir" 2>/dev/null || { echo "the guest has no directory $dir" >&2; exit 126; }
umask "$mask"
environment
exec "$@"
