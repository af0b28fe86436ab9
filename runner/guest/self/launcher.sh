#!/bin/sh
# Paddock's reference launcher, for images whose pools have "bootstrap: self". Run it once
# after boot, as the user whose jobs these are. On macOS: a LaunchAgent with RunAtLoad,
# and no KeepAlive, since one boot runs one runner.
#
#   PADDOCK_IN           where the share paddock-in is
#   PADDOCK_OUT          where the share paddock-out is
#   PADDOCK_RUNNER_DIR   where GitHub's runner is; default ~/actions-runner
#
# What the runner prints goes to this script's own output.
mask=$(umask) # is the runner's
umask 077
unset CDPATH
case $(uname -s) in
Darwin) shares='/Volumes/My Shared Files' ;;
*) shares=/mnt ;;
esac
in=${PADDOCK_IN:-$shares/paddock-in}
out=${PADDOCK_OUT:-$shares/paddock-out}
runner=${PADDOCK_RUNNER_DIR:-$HOME/actions-runner}
newline='
'

say() { printf '%s\n' "$*" >>"$out/status"; }
nap() { sleep 0.25 2>/dev/null || sleep 1; }

until [ -d "$in" ] && [ -d "$out" ]; do nap; done
if grep -q '^running' "$out/status" 2>/dev/null; then
	say exited 137 # an earlier launcher of this boot did not live to say so
	exit 0
fi
say ready launcher/1

# take reads the order into variables, which are not exported: the JIT config is in no
# argument and no environment. It fails if the host took the order back meanwhile. The
# directory is listed, since a guest may remember that a name was not there.
take() {
	ls "$in" >/dev/null 2>&1 && [ -d "$in/run" ] || return 1
	jitconfig=$(cat "$in/run/jitconfig") && environment=$(cat "$in/run/env") || return 1
	command=
	if [ -f "$in/run/command" ]; then
		command=$(cat "$in/run/command") || return 1
	else
		# GitHub's runner starts from files of its own: no argument is needed.
		cp -R "$in/run/jit/." "$runner/" || return 1
		command='set -- ./run.sh'
	fi
} 2>/dev/null

until take; do nap; done
say running
temporary=$(mktemp -d) || { say exited 126; exit 1; }

# listen passes the output on and tells the first job.
listen() {
	busy=
	while IFS= read -r line; do
		printf '%s\n' "$line"
		[ -z "$busy" ] || continue
		case $line in
		*'Running job: '*) busy=${line#*Running job: } ;;
		*"Running Job '"*"'") busy=${line#*Running Job \'}; busy=${busy%\'} ;;
		esac
		[ -z "$busy" ] || say busy "$busy"
	done
	: >"$temporary/drained"
}

# No part of this is started by &: the shell would have the job's programs ignore the
# interrupt signal for good.
{
	printf '%s' "$jitconfig" 2>/dev/null | (
		unset jitconfig
		[ ! -d "$runner" ] || cd "$runner" || exit 126
		umask "$mask"
		eval "$environment$newline$command"
		exec "$@" 2>&1
	)
	code=$?
	exec >/dev/null
	# Something may hold the output open for ever: half a second.
	for try in 1 2 3 4 5; do
		[ ! -f "$temporary/drained" ] || break
		sleep 0.1 2>/dev/null || sleep 1
	done
	say exited "$code"
	rm -rf "$temporary"
} | listen
