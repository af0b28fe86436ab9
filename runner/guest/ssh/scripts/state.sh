# What every script begins with: where the state lies, and how to read it.
#
#   claim      the keeper's process id, then the runner's name; made by link, once
#   log.N      what the runner prints, N from 100000000 on; the last two are kept
#   mark       made before the logs were last searched for a job
#   busy       seconds since 1970, then the line that names the job
#   drained    the runner's output has come to its end
#   exit       the exit status, then seconds since 1970
mask=$(umask) # is the runner's and the commands'
umask 077
unset CDPATH
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || sysctl -n kern.bootsessionuuid 2>/dev/null)
state=$HOME/.paddock/run-${boot:-unknown}

fail() {
	printf 'error %s\n' "$*"
	exit 1
}

nap() { sleep 0.25 2>/dev/null || sleep 1; }

# place sets dir to the runner's directory, of which the host gave $dir, maybe empty.
place() {
	[ -z "$dir" ] || return 0
	dir=$HOME
	[ ! -d "$HOME/actions-runner" ] || dir=$HOME/actions-runner
}

# find_job looks for the line that names the job, unless nothing was printed since.
find_job() {
	[ ! -f "$state/busy" ] || return 0
	newest=
	for log in "$state"/log.*; do newest=$log; done
	[ -f "$newest" ] || return 0
	[ ! "$state/mark" -nt "$newest" ] || return 0
	: >"$state/mark.$$"
	line=$(cat "$state"/log.* 2>/dev/null | LC_ALL=C tr -d '\000' | LC_ALL=C sed -n \
		-e '/^\([0-9][0-9T:. -]*Z: \)\{0,1\}Running job: ./{p;q;}' \
		-e "/^\([^ ]* ( [^ ]* ): \)\{0,1\}Running Job './{p;q;}" | dd bs=1024 count=1 2>/dev/null)
	if [ -n "$line" ]; then
		printf '%s %s\n' "$(date +%s)" "$line" >"$state/busy.$$" && mv -f "$state/busy.$$" "$state/busy"
	fi
	mv -f "$state/mark.$$" "$state/mark"
}

# look sets phase, name, busy and exit to what is known now.
look() {
	phase=idle name='' busy='' exit=''
	[ -f "$state/claim" ] || return 0
	{ read -r keeper && read -r name; } <"$state/claim"
	phase=running
	alive=yes
	kill -0 "$keeper" 2>/dev/null || alive=
	if [ -f "$state/exit" ]; then
		read -r exit <"$state/exit"
	elif [ -z "$alive" ]; then
		exit="137 $(date +%s)" # the keeper was killed, and wrote nothing
	fi
	find_job
	[ ! -f "$state/busy" ] || { read -r busy <"$state/busy"; phase=busy; }
	[ -z "$exit" ] || phase=exited
}

# tell prints what look found; after an exit the end of the output follows.
tell() {
	printf 'state %s\n' "$phase"
	[ -z "$name" ] || printf 'name %s\n' "$name"
	[ -z "$busy" ] || printf 'busy %s\n' "$busy"
	[ -z "$exit" ] || printf 'exit %s\n' "$exit"
	echo .
	[ "$phase" != exited ] || cat "$state"/log.* 2>/dev/null | tail -c 4096
}

# end_with_host ends this script when the host is gone, which is when the standard input
# ends: a session that prints nothing would never notice.
end_with_host() {
	exec 3<&0
	{ cat <&3; kill $$; } >/dev/null 2>&1 &
	exec </dev/null 3<&-
}
