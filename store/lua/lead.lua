-- lead takes or renews the leader's lease. A holder whose lease ran out gets a new
-- epoch like anybody else: someone may have read its absence in between.
local who, lease = ARGV[3], tonumber(ARGV[4])
local m = redis.call('HMGET', meta, 'incarnation', 'epoch', 'leader', 'until')
local expired = tonumber(m[4]) <= now
if not expired and m[3] ~= who then return {m[1], m[2], 0} end
local epoch = m[2]
if expired then
	epoch = whole(tonumber(m[2]) + 1)
	redis.call('HSET', meta, 'epoch', epoch, 'leader', who)
end
redis.call('HSET', meta, 'until', whole(now + lease))
return {m[1], epoch, 1}
