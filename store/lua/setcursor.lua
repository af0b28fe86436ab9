-- setcursor writes one, if the store is still the one the caller read it from.
if ARGV[3] ~= '' and redis.call('HGET', meta, 'incarnation') ~= ARGV[3] then
	return {'fenced', 'the store was emptied since'}
end
redis.call('HSET', cursors, ARGV[4], ARGV[5])
return {}
