# The host set dir, path, mode and size; the file is on the standard input.
case $path in
/*) ;;
*)
	[ -n "$dir" ] || dir=$HOME/actions-runner # made where it is missing
	path=$dir/$path
	;;
esac
[ ! -d "$path" ] || fail "$path is a directory"
mkdir -p "$(dirname "$path")" || fail "the directory of $path cannot be made"
beside=$path.paddock.$$
trap 'rm -f "$beside"' EXIT
trap 'exit 1' HUP TERM PIPE
cat >"$beside" || fail "$path cannot be written"
got=$(wc -c <"$beside")
[ "$((got + 0))" = "$size" ] || fail "$path: $((got + 0)) bytes of $size arrived"
chmod "$mode" "$beside" && mv -f "$beside" "$path" || fail "$path cannot be put in place"
echo ok
