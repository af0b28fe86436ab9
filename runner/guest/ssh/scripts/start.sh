# The host set runner, dir, the arguments ($@) and the function environment. On the
# standard input is the runner's input, as printf %b reads it, and a full stop.
input=$(cat)
case $input in
*.) input=${input%.} ;;
*) exit 1 ;; # cut off: the host is gone
esac

# answer says who has the guest, if anybody has.
answer() {
	look
	case $phase:$name in
	idle:*) return 0 ;;
	*:"$runner") echo ok ;;
	*) printf 'occupied %s\n' "$name" ;;
	esac
	exit 0
}

# record keeps what the runner prints in files of 1 MiB or at most a quarter more, two at
# most. It goes by reads, so that each word is there at once; a dd ends after 256 of them,
# long or short, and the size says when a file is full. A runner is not stopped because
# its output cannot be kept.
record() {
	n=100000000
	size=0
	while dd bs=1024 count=256 >>"$state/log.$n"; do
		before=$size
		size=$(wc -c <"$state/log.$n") || break
		size=$((size + 0))
		[ "$size" -gt "$before" ] || break # the end
		[ "$size" -ge 1048576 ] || continue
		find_job
		rm -f "$state/log.$((n - 1))"
		n=$((n + 1))
		size=0
	done
	cat >/dev/null
	: >"$state/drained"
} 2>/dev/null

# apart runs the program as the leader of a process group of its own, in the place of
# this shell. Not by &: the shell would have it ignore the interrupt signal for good.
apart() {
	sh -c 'echo $PPID' >"$state/leader"
	if command -v setsid >/dev/null 2>&1; then
		exec setsid "$@"
	elif command -v perl >/dev/null 2>&1; then
		exec perl -e 'setpgrp(0, 0); exec { $ARGV[0] } @ARGV or exit 127' "$@"
	fi
	: >"$state/leader"
	exec "$@"
}

# keep runs the one runner and writes down its end. What it leaves behind is killed. The
# shell's own words ("Killed") are not the runner's output.
keep() {
	printf '%b' "$input" 2>/dev/null | (
		unset input
		exec 2>&1
		cd "$dir" || exit 126
		umask "$mask"
		environment
		apart "$@"
	)
	code=$?
	exec >/dev/null 2>&1
	if read -r leader <"$state/leader" && [ -n "$leader" ]; then kill -9 "-$leader"; fi
	# Something may hold the output open for ever: half a second.
	for try in 1 2 3 4 5; do
		[ ! -f "$state/drained" ] || break
		sleep 0.1 || sleep 1
	done
	printf '%s %s\n' "$code" "$(date +%s)" >"$state/exit.$$" && mv -f "$state/exit.$$" "$state/exit"
}

answer
place
cd -- "$dir" 2>/dev/null || fail "the guest has no directory $dir"
dir=$(pwd)
command -v "$1" >/dev/null 2>&1 || fail "the guest has no program $1 (in $dir, PATH $PATH)"
mkdir -p "$state" || fail "the guest has no room for the runner's state in $state"

# From the claim on this shell is the keeper, whatever becomes of the session: signals
# of its end are caught, not ignored, since the runner would inherit that.
trap : HUP PIPE TERM
printf '%s\n%s\n' $$ "$runner" >"$state/claim.$$"
ln "$state/claim.$$" "$state/claim" 2>/dev/null
won=$?
rm -f "$state/claim.$$"
[ $won = 0 ] || { answer; fail "the runner's state in $state cannot be written"; }
echo ok
exec </dev/null >/dev/null 2>&1
keep "$@" 2>/dev/null | record
