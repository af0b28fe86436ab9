end_with_host
said=
while :; do
	look
	if [ "$phase $busy" != "$said" ]; then
		tell
		said="$phase $busy"
	fi
	[ "$phase" != exited ] || exit 0
	nap
done
