-- restore puts part of a snapshot into a store: triples of kind (j, t, c), key, value.
for i = 3, #ARGV, 3 do
	local kind, key, value = ARGV[i], ARGV[i + 1], ARGV[i + 2]
	if kind == 'j' then
		redis.call('HSET', jobs, key, value)
		mark('j' .. key)
	elseif kind == 't' then
		redis.call('ZADD', tombs, value, key)
	else
		redis.call('HSET', cursors, key, value)
	end
end
return 1
