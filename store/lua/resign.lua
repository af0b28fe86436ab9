-- resign gives the lease back at once, so that the next leader need not wait for it.
if redis.call('HGET', meta, 'leader') == ARGV[3] then
	redis.call('HSET', meta, 'leader', '', 'until', '0')
	redis.call('PUBLISH', channel, '')
end
return 1
