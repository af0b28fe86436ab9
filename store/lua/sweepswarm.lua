-- sweepswarm deletes what is kept of an image at a site where nobody has said a word for
-- as long as nodes that have left are remembered.
local stay = tonumber(take())
local last = redis.call('ZSCORE', swarms, swarm)
if last and tonumber(last) > now - stay then return {0} end
sink()
return {1}
